"""The forecaster and the plan of a ``TaylorSeerCacheConfig`` of diffusers."""

from collections.abc import Callable

from diffusers import TaylorSeerCacheConfig
from torch import Tensor

from lesa.forecasters import Taylor
from lesa.tables.plan import StepPlan


def from_taylorseer_config(config: TaylorSeerCacheConfig) -> tuple[Taylor, Callable[[Tensor], StepPlan]]:
    """The forecaster and the plan that are equivalent to a configuration: ``enable(pipeline, *this)``.

    The same steps are full and the expansion has the same order. It is always that of the input of the final norm,
    whichever modules the configuration names, so no block runs on a predicted step. If ``cache_identifiers`` name whole
    blocks, outputs are equal up to rounding. By default diffusers expands the output of every attention and runs the
    rest of the blocks; with ``use_lite_mode`` it expands the output of the final projection.
    ``taylor_factors_dtype`` is ignored: features keep their dtype and are combined in float32.

    Returns:
        A :class:`Taylor`, and a function of the times of a generation [steps + 1] that returns a :class:`StepPlan`.

    Raises:
        ValueError: for a configuration with which diffusers itself fails at the first step.
    """
    if not isinstance(config, TaylorSeerCacheConfig):
        raise ValueError(f"give a TaylorSeerCacheConfig of diffusers, not a {type(config).__name__}")
    interval, first, cooldown = config.cache_interval, config.disable_cache_before_step, config.disable_cache_after_step
    if interval < 1 or first < 1:
        raise ValueError(
            f"cache_interval={interval} and disable_cache_before_step={first} must be at least 1, since nothing is "
            "known before the first step"
        )

    def plan(times: Tensor) -> StepPlan:
        """The full steps of diffusers' hook."""
        steps = len(times) - 1
        full = {*range(first), *range(first + 1, steps, interval)}
        if interval == 1:
            full.add(first)
        if cooldown is not None:
            full.update(range(cooldown, steps))
        return StepPlan(steps, (step for step in full if step < steps))

    return Taylor(config.max_order), plan
