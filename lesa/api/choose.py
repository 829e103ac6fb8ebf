"""What :func:`lesa.enable` was asked for, as forecasters and a plan."""

import logging
from pathlib import Path
from typing import Any

from lesa.api.folders import load
from lesa.calibration.budget import Budget
from lesa.calibration.calibration import Calibration
from lesa.forecasters import Multistep, Taylor
from lesa.forecasters.base import Forecasters, as_forecasters, forecaster_list
from lesa.forecasters.registry import registered
from lesa.runtime.plans import Plan
from lesa.tables.plan import StepPlan

log = logging.getLogger(__name__)

UNCALIBRATED = Taylor(2, "time")
UNCALIBRATED_SUBSTEPS = Multistep()


def resolve_request(
    forecaster: Any,
    plan: Plan | None,
    *,
    full_steps: int | None = None,
    speedup: float | None = None,
    evaluations: int | None = None,
    max_error: float | None = None,
) -> tuple[Forecasters, Plan]:
    """Forecasters and a plan from the arguments of :func:`lesa.enable`.

    Args:
        forecaster, plan, full_steps, speedup, evaluations, max_error: as there.

    Raises:
        ValueError: if there is no plan, or more than one, or an argument is of the wrong kind.
        FileNotFoundError: for the name of a folder that does not exist.
    """
    given = {"full_steps": full_steps, "speedup": speedup, "evaluations": evaluations, "max_error": max_error}
    budget: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if len(budget) + (plan is not None) > 1:
        raise ValueError(
            f"say either plan= or one of evaluations=, full_steps=, speedup= and max_error=, not {sorted(budget)}"
        )
    if plan is not None and not isinstance(plan, StepPlan) and not callable(plan):
        raise ValueError(f"plan must be a StepPlan or a function of the times, not {type(plan).__name__}")
    if isinstance(forecaster, str | Path):
        forecaster = _read(forecaster)
    if isinstance(forecaster, Calibration):
        if plan is None and not budget:
            raise ValueError(
                "a calibration serves any budget: say evaluations=10, speedup=5, full_steps=10 or max_error=0.01"
            )
        return forecaster.forecasters(), plan or Budget(**budget, calibration=forecaster)
    wish = Budget(**budget) if budget else None
    if forecaster is None:
        forecaster = UNCALIBRATED if evaluations is None else UNCALIBRATED_SUBSTEPS
        log.warning(
            "nothing is calibrated: steps are predicted by %r, full steps are spread over the noise levels; "
            "lesa.calibrate(pipeline, prompts) measures which steps and coefficients are best for this model",
            forecaster,
        )
    forecasters = as_forecasters(forecaster)
    return forecasters, plan or wish or fitted_plan(forecasters)


def _read(where: str | Path) -> Any:
    if isinstance(where, str) and where in registered() and not Path(where).exists():
        raise ValueError(f"forecaster={where!r} is a name; give the forecaster: lesa.make_forecaster({where!r})")
    return load(where)


def fitted_plan(forecasters: Forecasters) -> StepPlan:
    """The plan that all of the forecasters were fitted for.

    Raises:
        ValueError: if they have none, or different ones.
    """
    plans = {forecaster.plan for forecaster in forecaster_list(forecasters)}
    if len(plans) == 1 and (plan := plans.pop()) is not None:
        return plan
    raise ValueError("say which steps are full: plan=StepPlan.paper(50, interval=7), or how many: speedup=5")
