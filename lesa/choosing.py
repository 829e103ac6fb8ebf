"""What :func:`lesa.enable` was asked for, as forecasters and a plan."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lesa.calibration.calibration import Calibration
from lesa.forecasters import Forecaster, Taylor
from lesa.plan import StepPlan
from lesa.runtime.accelerator import Forecasters, Plan
from lesa.sharing import load

log = logging.getLogger(__name__)

UNCALIBRATED = Taylor(2, "time")


def choose(
    forecaster: Forecasters | Calibration | str | Path | None,
    plan: Plan | None,
    *,
    full_steps: int | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
) -> tuple[Forecasters, Plan]:
    """Forecasters and a plan from whatever was given.

    Raises:
        ValueError: if there is no plan, or more than one.
        FileNotFoundError: for the name of a folder that does not exist.
    """
    given = {"full_steps": full_steps, "speedup": speedup, "max_error": max_error}
    budget: dict[str, float] = {name: value for name, value in given.items() if value is not None}
    if len(budget) + (plan is not None) > 1:
        raise ValueError(f"say either plan= or one of full_steps=, speedup= and max_error=, not {sorted(budget)}")
    if isinstance(forecaster, str | Path):
        forecaster = load(forecaster)
    if isinstance(forecaster, Calibration):
        if plan is None and not budget:
            raise ValueError("a calibration serves any budget: say speedup=5, full_steps=10 or max_error=0.01")
        return forecaster.forecasters(), plan or forecaster.planner(**budget)
    if max_error is not None:
        raise ValueError("max_error needs a calibration: lesa.calibrate(pipeline, prompts)")
    if forecaster is None:
        log.warning(
            "nothing is calibrated: steps are predicted by %r, full steps are evenly spaced in noise level; "
            "lesa.calibrate(pipeline, prompts) measures which steps and coefficients are best for this model",
            UNCALIBRATED,
        )
        forecaster = UNCALIBRATED
    if plan is None:
        plan = _evenly(budget) if budget else own_plan(forecaster)
    if not isinstance(plan, StepPlan) and not callable(plan):
        raise ValueError(f"plan must be a StepPlan or a function of the times, not {type(plan).__name__}")
    return forecaster, plan


def each(forecasters: Forecasters) -> list[Forecaster]:
    """All forecasters, whether there is one for all streams or one for each."""
    return list(forecasters.values()) if isinstance(forecasters, Mapping) else [forecasters]


def _evenly(budget: dict[str, float]) -> Callable[[Tensor], StepPlan]:
    def plan(times: Tensor) -> StepPlan:
        steps = len(times) - 1
        return StepPlan.even(times, int(budget.get("full_steps", steps / budget.get("speedup", 1.0) + 1e-9)))

    return plan


def own_plan(forecasters: Forecasters) -> StepPlan:
    """The plan that all of the forecasters bring."""
    plans = {getattr(f, "plan", None) for f in each(forecasters)}
    if len(plans) == 1 and isinstance(plan := plans.pop(), StepPlan):
        return plan
    raise ValueError("say which steps are full: plan=StepPlan.paper(50, interval=7), or how many: speedup=5")
