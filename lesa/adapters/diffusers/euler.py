"""Euler's method: whether a scheduler is one whose steps can be divided, and setting its times."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lesa.adapters.diffusers.derived_class import derived_class

ChooseTimes = Callable[[Tensor], Tensor]  # from the noise levels [steps + 1] of a schedule to others, as many


def reason_not_divisible(scheduler: Any) -> str:
    """Why the steps of a scheduler cannot be divided into substeps; empty: they can.

    With substeps, the model's output is its mean over a step. That is exact if the scheduler does nothing but add
    ``output * length of the step``; one with a memory takes the output for that of one time, one with noise of its own
    leaves the path that the mean was made for.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return f"{name} is not Euler's method for flow matching (FlowMatchEulerDiscreteScheduler)"
    if scheduler.config.get("stochastic_sampling"):
        return f"{name} with stochastic_sampling adds noise at every step"
    if type(scheduler).step is not FlowMatchEulerDiscreteScheduler.step:
        return f"{name} has a step of its own"
    return f"{name} with invert_sigmas counts from the image" if scheduler.config.get("invert_sigmas") else ""


def choose_times(scheduler: Any, choose: ChooseTimes) -> Callable[[], None]:
    """Let every ``set_timesteps`` of a scheduler end with the times that ``choose`` returns; returns what undoes it.

    A schedule that a call gives explicitly, such as ``sigmas=``, is left alone.
    """
    original: Any = type(scheduler)
    scheduler.__class__ = _choosing(original)
    scheduler.choose_times = choose

    def undo() -> None:
        if type(scheduler) is _choosing(original):
            scheduler.__class__ = original
        vars(scheduler).pop("choose_times", None)

    return undo


@functools.cache
def _choosing(kind: Any) -> type:
    """A scheduler class that chooses its times."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        if "choose_times" in vars(self) and not _is_explicit(*args, **kwargs):
            levels = self.choose_times(self.sigmas.double().cpu())
            self.sigmas = levels.to(self.sigmas)
            self.timesteps = (levels[:-1] * self.config.num_train_timesteps).to(self.timesteps)
        return result

    return derived_class(kind, "choose_times", set_timesteps=set_timesteps)


def _is_explicit(
    num_inference_steps: int | None = None,
    device: Any = None,
    sigmas: Any = None,
    mu: float | None = None,
    timesteps: Any = None,
) -> bool:
    """Whether the caller chose the times. Pipelines give evenly spaced sigmas themselves, which is no choice."""
    if timesteps is not None:
        return True
    return (
        sigmas is not None and len(sigmas) > 2 and float(np.ptp(np.diff(np.asarray(sigmas, dtype=np.float64)))) > 1e-4
    )
