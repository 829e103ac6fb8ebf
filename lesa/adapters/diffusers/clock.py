"""Which step a call belongs to, on which schedule, in which generation."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lesa.adapters.diffusers.discovery import TIMES
from lesa.schedule import as_times


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


class SchedulerClock:
    """Reads the pipeline's scheduler, which counts its own steps on the host.

    ``set_timesteps`` makes a new tensor of timesteps, so that tensor is the generation.

    Args:
        pipeline: asked for its scheduler at every call, since users replace it.

    Raises:
        ValueError: if the scheduler does not count its steps.
    """

    def __init__(self, pipeline: Any) -> None:
        if not hasattr(pipeline.scheduler, "step_index"):
            raise ValueError(
                f"{type(pipeline.scheduler).__name__} does not tell its step; use a scheduler with step_index, such as "
                "FlowMatchEulerDiscreteScheduler, or enable the transformer alone with times=..."
            )
        self._pipeline = pipeline
        self._timesteps: Tensor | None = None
        self._times: Tensor | None = None

    def read(self, arguments: dict[str, Any]) -> Moment:
        scheduler = self._pipeline.scheduler
        if scheduler.timesteps is not self._timesteps:
            self._timesteps = scheduler.timesteps
            self._times = noise_levels(scheduler)
        step = scheduler.step_index
        if step is None:  # before the first step
            step = scheduler.begin_index or 0
        return Moment(step, self._times, self._timesteps, self._timesteps)


def noise_levels(scheduler: Any) -> Tensor:
    """Noise levels [steps + 1] float64 in [0, 1] of the generation that a scheduler is set to.

    Flow-matching schedulers have them as sigmas; for others the share of the training timesteps stands in.
    """
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == count + 1 and float(sigmas.max()) <= 1:
        return as_times(sigmas, count)
    return as_times(scheduler.timesteps / scheduler.config.num_train_timesteps, count)


class TimestepClock:
    """Reads the time that a bare transformer is called with; costs one host synchronisation a call on a GPU.

    Args:
        times: the schedule [steps + 1]; each call is the step nearest to its time. None: calls are counted.
    """

    TOLERANCE = 4e-3  # bf16 rounds times near 1 by up to 2e-3

    def __init__(self, times: Tensor | None) -> None:
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
