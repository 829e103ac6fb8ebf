"""Which step of which generation a call is."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lesa.adapters.diffusers.counting import count_steps, is_counted, stop_counting
from lesa.adapters.diffusers.euler import reason_not_divisible
from lesa.adapters.diffusers.models import TIME_ARGUMENTS
from lesa.adapters.diffusers.noise_levels import noise_levels
from lesa.adapters.diffusers.pipeline import calling_pipeline
from lesa.runtime.driver import ONLY_SESSION, UNKNOWN_SAMPLER, Session
from lesa.tables.times import as_times


class StepInfo(NamedTuple):
    """The step of a call.

    Attributes:
        step: its index in the schedule.
        times: noise levels [steps + 1], or None.
        generation: the same object for all calls of a generation.
        timesteps: [steps] of the scheduler, on the device; None: the steps to come are not known.
        values: the numbers in ``timesteps``, on the host.
        session: the user whose generation this is.
        indivisible: why the step cannot be divided into substeps; empty: it can.
    """

    step: int
    times: Tensor | None
    generation: object
    timesteps: Tensor | None = None
    values: Sequence[float] = ()
    session: Session = ONLY_SESSION
    indivisible: str = UNKNOWN_SAMPLER


class StepClock(ABC):
    """Tells the step of each call of a transformer."""

    @abstractmethod
    def read(self, arguments: dict[str, Any], component: str, transformer: nn.Module) -> StepInfo:
        """The step of a call; ``arguments`` of forward by name, ``component``: the name of the transformer."""

    @abstractmethod
    def session(self, component: str, transformer: nn.Module) -> Session | None:
        """The session of the calling pipeline, if it is known and has called the transformer before."""

    def close(self) -> None:  # noqa: B027 (most have nothing to undo)
        """Undo all changes of schedulers; the clock is not read again."""


@dataclass
class SchedulerPosition:
    """The generation of one scheduler.

    Attributes:
        timesteps: the tensor of the generation; ``values``: its numbers; ``times``: its noise levels.
        first: the step of the first call, once it is known.
        before: the scheduler's count of steps at that call.
        indivisible: why its steps cannot be divided; empty: they can.
    """

    timesteps: Tensor | None = None
    values: Sequence[float] = ()
    times: Tensor | None = None
    first: int | None = None
    before: int = 0
    indivisible: str = UNKNOWN_SAMPLER
    session: Session = field(default_factory=Session)


class SchedulerClock(StepClock):
    """Reads the pipeline's scheduler, on the host: a step is one evaluation of the transformer for one branch.

    ``set_timesteps`` creates a new tensor of timesteps, so this tensor identifies the generation. Its values are read
    once, before the first step. Most schedulers count their steps; for those that do not (DDIM, DDPM, PNDM), the calls
    of ``step`` are counted. If the pipeline does not say at which step it begins (some start part-way through the
    schedule), the time of the first call tells it, which costs one more synchronisation in each generation.

    Several pipelines may share the transformer, each with its own scheduler. The scheduler of the calling pipeline is
    used, and each has its own position.

    Args:
        pipeline: its scheduler is used if the caller is no pipeline; it is read at every call, since users replace it.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._positions: WeakKeyDictionary[Any, SchedulerPosition] = WeakKeyDictionary()
        self._counted: WeakSet[Any] = WeakSet()
        self._thousands = False  # a time above 1 was seen, so a time of 1 is near the image

    def read(self, arguments: dict[str, Any], component: str, transformer: nn.Module) -> StepInfo:
        scheduler = self._scheduler(component, transformer)
        if scheduler not in self._positions:
            self._positions[scheduler] = SchedulerPosition()
        at = self._positions[scheduler]
        if scheduler.timesteps is not at.timesteps:
            at.times = noise_levels(scheduler)
            at.timesteps, at.values = scheduler.timesteps, scheduler.timesteps.tolist()
            at.first, at.indivisible = None, reason_not_divisible(scheduler)
        step = scheduler.step_index if hasattr(scheduler, "step_index") else self._count(at, scheduler, arguments)
        if step is None:  # before the first step
            step = getattr(scheduler, "begin_index", None)
            if step is None:
                step = self._locate(at, scheduler, arguments)
        indivisible = at.indivisible
        if getattr(arguments.get("timestep"), "ndim", 0) > 1:
            indivisible = "each token has a time of its own"
        return StepInfo(step, at.times, at.timesteps, at.timesteps, at.values, at.session, indivisible)

    def session(self, component: str, transformer: nn.Module) -> Session | None:
        caller = calling_pipeline(component, transformer)
        position = None if caller is None else self._positions.get(caller.scheduler)
        return None if position is None else position.session

    def close(self) -> None:
        while self._counted:
            stop_counting(self._counted.pop())

    def _scheduler(self, component: str, transformer: nn.Module) -> Any:
        caller = calling_pipeline(component, transformer)
        return (self._pipeline if caller is None else caller).scheduler

    def _count(self, at: SchedulerPosition, scheduler: Any, arguments: dict[str, Any]) -> int:
        """The step of a scheduler that does not count: the first step, and the calls of ``step`` since then."""
        if not is_counted(scheduler):
            count_steps(scheduler)
            self._counted.add(scheduler)
        if at.first is None:
            at.before = scheduler.steps_taken
        return self._locate(at, scheduler, arguments) + int(scheduler.steps_taken) - at.before

    def _locate(self, at: SchedulerPosition, scheduler: Any, arguments: dict[str, Any]) -> int:
        """The step of the first call of a generation, by its time: the earliest step that rounds to it."""
        if at.first is None:
            given = next((arguments[name] for name in TIME_ARGUMENTS if arguments.get(name) is not None), None)
            time = None if given is None else float(torch.as_tensor(given).max())
            self._thousands = self._thousands or (time is not None and time > 1)
            at.first = 0 if time is None else nearest_step(time, at.timesteps, scheduler, thousands=self._thousands)
        return at.first


# Relative to the time of pure noise; bf16 rounds times near it by up to 0.002.
ROUNDING = 4e-3


def nearest_step(given: Tensor | float, timesteps: Tensor | None, scheduler: Any, *, thousands: bool = False) -> int:
    """The step of a schedule at which a model is called with this time; 0 if no step has it.

    Models are called with the scheduler's timestep, a share of it, or one minus that; per-token times (image to video)
    are 0 at given tokens. No generation begins at the image, where some schedules end.

    Args:
        given: the time, [...].
        timesteps: of the scheduler, [steps].
        scheduler: has the number of timesteps of the training in its configuration.
        thousands: the model is known to be called with timesteps, so that a time of 1 is not pure noise.
    """
    assert timesteps is not None
    schedule = timesteps.double().cpu()
    time, unit = float(torch.as_tensor(given).max()), float(scheduler.config.get("num_train_timesteps", 1000))
    readings = [time] if time > 1 or thousands else [time * unit, unit - time * unit, time]
    distances = [(schedule - reading).abs() for reading in readings if reading or schedule[-1]]
    closest = min(distances, key=lambda distance: float(distance.min()))
    if float(closest.min()) > ROUNDING * unit:  # the time was changed on its way to the model
        return 0
    return int((closest <= closest.min() + 1e-6 * unit).nonzero()[0])


@dataclass
class Calls:
    """The generation of one thread, if only the times of the calls tell its steps."""

    generation: object = field(default_factory=object)
    last: tuple[int, float] | None = None  # the latest step and its time
    session: Session = field(default_factory=Session)


class TimestepClock(StepClock):
    """Reads the time that a bare transformer is called with; on a GPU that is one host synchronisation for each call.

    Each thread has a generation of its own.

    Args:
        times: the schedule [steps + 1]; each call is the step nearest to its time. None: calls are counted.
        divisible: the caller's loop is Euler's method.

    Raises:
        ValueError: if a time of the schedule occurs twice, as with solvers of second order.
    """

    def __init__(self, times: Tensor | None, divisible: bool = False) -> None:
        self._indivisible = "" if divisible else UNKNOWN_SAMPLER
        if times is not None and bool((times[:-1].diff() == 0).any()):
            raise ValueError(
                "two steps of times= are at the same time, so that a call does not tell its step; enable the pipeline "
                "instead, whose scheduler does"
            )
        self._times = times
        self._threads: WeakKeyDictionary[threading.Thread, Calls] = WeakKeyDictionary()
        self._unit = 1  # the time of pure noise: 1, or 1000 once a time above 1 was seen

    def read(self, arguments: dict[str, Any], component: str, transformer: nn.Module) -> StepInfo:
        time = self._time(arguments)
        at = self._threads.setdefault(threading.current_thread(), Calls())
        step = self._step(at, time)
        if at.last is not None and (step < at.last[0] or time > at.last[1]):
            at.generation = object()  # time ran backwards: a new generation
        at.last = (step, time)
        return StepInfo(step, self._times, at.generation, session=at.session, indivisible=self._indivisible)

    def session(self, component: str, transformer: nn.Module) -> Session | None:
        at = self._threads.get(threading.current_thread())
        return None if at is None else at.session

    def _step(self, at: Calls, time: float) -> int:
        if self._times is not None:
            distance = (self._times[:-1] - time).abs()
            step = int(distance.argmin())
            if distance[step] > ROUNDING:
                raise ValueError(f"the transformer was called at time {time:.4f}, which is not in times=...")
            return step
        if at.last is None or time > at.last[1]:
            return 0
        return at.last[0] + (time < at.last[1])

    def _time(self, arguments: dict[str, Any]) -> float:
        """The time of a call in [0, 1]; models are called with it or with a thousand times it."""
        for name in TIME_ARGUMENTS:
            if name in arguments:
                # per-token times (image to video) are 0 at given tokens
                time = float(torch.as_tensor(arguments[name]).max())
                self._unit = 1000 if time > 1 else self._unit
                return time / self._unit
        raise ValueError(f"the transformer was called without a time ({', '.join(TIME_ARGUMENTS)})")


def make_clock(
    target: Any,
    times: Tensor | Sequence[float] | None = None,
    num_steps: int | None = None,
    *,
    divisible: bool = False,
) -> StepClock:
    """The scheduler of a pipeline, or the times of a bare transformer.

    Args:
        target: a pipeline or a transformer.
        times: of a bare transformer, [steps] or [steps + 1]; None: its calls are counted.
        num_steps: of a bare transformer with times; None: they are not fixed.
        divisible: the loop around a bare transformer is Euler's method.

    Raises:
        ValueError: if times are given for a pipeline, it has no scheduler, or the number of steps is not fixed.
    """
    if not isinstance(target, nn.Module):
        if times is not None:
            raise ValueError("a pipeline takes its times from its scheduler; times= is for a bare transformer")
        if not hasattr(target, "scheduler"):
            raise ValueError(f"{type(target).__name__} has no scheduler; enable its transformer alone with times=...")
        return SchedulerClock(target)
    if times is None:
        return TimestepClock(None)
    if num_steps is None:
        raise ValueError("a bare transformer needs a fixed plan")
    return TimestepClock(as_times(times, num_steps), divisible)
