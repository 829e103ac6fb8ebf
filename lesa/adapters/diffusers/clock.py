"""Which step a call belongs to, on which schedule, in which generation."""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lesa.adapters.diffusers.discovery import TIMES
from lesa.adapters.diffusers.noise import noise_levels


class Moment(NamedTuple):
    """Where a call stands.

    ``generation`` is one object for as long as the generation lasts; ``timesteps`` [steps] are the scheduler's, on the
    device, or None where nobody knows what comes.
    """

    step: int
    times: Tensor | None
    generation: object
    timesteps: Tensor | None = None


class Clock(Protocol):
    """Tells the moment of each call of a transformer."""

    def read(self, arguments: dict[str, Any]) -> Moment:
        """The moment of a call with these arguments of forward, by name."""
        ...

    def close(self) -> None:
        """Nobody will read it again."""
        ...


class SchedulerClock:
    """Reads the pipeline's scheduler, on the host: a step is one evaluation of the transformer for one branch.

    ``set_timesteps`` makes a new tensor of timesteps, so that tensor is the generation. Its values are read once a
    generation, before the first step. Most schedulers count their steps; where one does not (DDIM, DDPM, PNDM), the
    calls of its ``step`` are counted. Where the pipeline does not say at which step it begins (some start part-way
    through the schedule), the first call's own time tells it, which costs one more synchronisation a generation.

    Args:
        pipeline: asked for its scheduler at every call, since users replace it.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._counted: list[Any] = []
        self._timesteps: Tensor | None = None
        self._times: Tensor | None = None
        self._first: int | None = None  # the step that the first call of the generation was at, once it is known
        self._before = 0  # what a scheduler's count was at that call

    def read(self, arguments: dict[str, Any]) -> Moment:
        scheduler = self._pipeline.scheduler
        if scheduler.timesteps is not self._timesteps:
            self._times = noise_levels(scheduler)
            self._timesteps = scheduler.timesteps
            self._first = None
        step = scheduler.step_index if hasattr(scheduler, "step_index") else self._count(scheduler, arguments)
        if step is None:  # before the first step
            step = getattr(scheduler, "begin_index", None)
            if step is None:
                step = self._locate(arguments)
        return Moment(step, self._times, self._timesteps, self._timesteps)

    def close(self) -> None:
        while self._counted:
            stop_counting(self._counted.pop())

    def _count(self, scheduler: Any, arguments: dict[str, Any]) -> int:
        """The step of a scheduler that does not tell it: where the generation began, and its steps since then."""
        if not is_counted(scheduler):
            count_steps(scheduler)
            self._counted.append(scheduler)
        if self._first is None:
            self._before = scheduler.steps_taken
        return self._locate(arguments) + scheduler.steps_taken - self._before

    def _locate(self, arguments: dict[str, Any]) -> int:
        """The step whose time the first call of a generation is given: the earliest that rounds to it."""
        if self._first is None:
            given = next((arguments[name] for name in TIMES if arguments.get(name) is not None), None)
            self._first = 0 if given is None else nearest_step(given, self._timesteps, self._pipeline.scheduler)
        return self._first


def nearest_step(given: Tensor | float, timesteps: Tensor | None, scheduler: Any) -> int:
    """The step of a schedule at which a model is called with this time.

    Models are called with the scheduler's timestep, a share of it, or one minus that; per-token times (image to video)
    are 0 at given tokens. No generation begins at the image, where some schedules end.
    """
    assert timesteps is not None
    schedule = timesteps.double().cpu()
    time, unit = float(torch.as_tensor(given).max()), float(scheduler.config.get("num_train_timesteps", 1000))
    readings = [time] if time > 1 else [time * unit, unit - time * unit, time]
    distances = [(schedule - reading).abs() for reading in readings if reading or schedule[-1]]
    closest = min(distances, key=lambda distance: float(distance.min()))
    return int((closest <= closest.min() + 1e-6 * unit).nonzero()[0])


@functools.cache
def _counting(kind: Any) -> type:
    """A scheduler class whose ``step`` counts; copies and pickles of its instances are of the plain class."""

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        self.steps_taken += 1
        return result

    def reduce(self: Any, protocol: Any) -> Any:
        return _new, (kind,), {name: value for name, value in vars(self).items() if name != "steps_taken"}

    names = {"step": step, "counts_steps": True, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def is_counted(scheduler: Any) -> bool:
    """Whether :func:`count_steps` was called on this scheduler, and not only on the one that it was copied from."""
    return hasattr(type(scheduler), "counts_steps")


def count_steps(scheduler: Any) -> None:
    """Let a scheduler count its steps in ``steps_taken``."""
    kind: Any = type(scheduler)
    scheduler.steps_taken = 0
    scheduler.__class__ = _counting(kind)


def stop_counting(scheduler: Any) -> None:
    """Undo :func:`count_steps`."""
    scheduler.__class__ = type(scheduler).__mro__[1]
    del scheduler.steps_taken


class TimestepClock:
    """Reads the time that a bare transformer is called with; costs one host synchronisation a call on a GPU.

    Args:
        times: the schedule [steps + 1]; each call is the step nearest to its time. None: calls are counted.

    Raises:
        ValueError: if a time of the schedule occurs twice, as with solvers of second order.
    """

    TOLERANCE = 4e-3  # bf16 rounds times near 1 by up to 2e-3

    def __init__(self, times: Tensor | None) -> None:
        if times is not None and bool((times[:-1].diff() == 0).any()):
            raise ValueError(
                "two steps of times= are at the same time, so that a call does not tell its step; enable the pipeline "
                "instead, whose scheduler does"
            )
        self._times = times
        self._generation = object()
        self._last: tuple[int, float] | None = None

    def read(self, arguments: dict[str, Any]) -> Moment:
        time = _time_argument(arguments)
        step = self._step(time)
        if self._last is not None and (step < self._last[0] or time > self._last[1]):
            self._generation = object()  # time ran backwards: a new generation
        self._last = (step, time)
        return Moment(step, self._times, self._generation)

    def close(self) -> None:
        pass

    def _step(self, time: float) -> int:
        if self._times is not None:
            distance = (self._times[:-1] - time).abs()
            step = int(distance.argmin())
            if distance[step] > self.TOLERANCE:
                raise ValueError(f"the transformer was called at time {time:.4f}, which is not in times=...")
            return step
        if self._last is None or time > self._last[1]:
            return 0
        return self._last[0] + (time < self._last[1])


def _time_argument(arguments: dict[str, Any]) -> float:
    """The time of a call in [0, 1]; models are called with it or with a thousand times it."""
    for name in TIMES:
        if name in arguments:
            # per-token times (image to video) are 0 at given tokens
            time = float(torch.as_tensor(arguments[name]).max())
            return time / 1000 if time > 1 else time
    raise ValueError(f"the transformer was called without a time ({', '.join(TIMES)})")
