"""What :func:`lesa.enable` was asked for, as forecasters and a plan."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa.budget import Budget
from lesa.calibration.calibration import Calibration
from lesa.forecasters import Forecaster, Taylor, registered
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
        ValueError: if there is no plan, or more than one, or an argument is of the wrong kind.
        FileNotFoundError: for the name of a folder that does not exist.
    """
    given = {"full_steps": full_steps, "speedup": speedup, "max_error": max_error}
    budget: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if len(budget) + (plan is not None) > 1:
        raise ValueError(f"say either plan= or one of full_steps=, speedup= and max_error=, not {sorted(budget)}")
    if plan is not None and not isinstance(plan, StepPlan) and not callable(plan):
        raise ValueError(f"plan must be a StepPlan or a function of the times, not {type(plan).__name__}")
    if isinstance(forecaster, str | Path):
        forecaster = _read(forecaster)
    if isinstance(forecaster, Calibration):
        if plan is None and not budget:
            raise ValueError("a calibration serves any budget: say speedup=5, full_steps=10 or max_error=0.01")
        return forecaster.forecasters(), plan or Budget(**budget, calibration=forecaster)
    wish = Budget(**budget) if budget else None
    if forecaster is None:
        log.warning(
            "nothing is calibrated: steps are predicted by %r, full steps are evenly spaced in noise level; "
            "lesa.calibrate(pipeline, prompts) measures which steps and coefficients are best for this model",
            UNCALIBRATED,
        )
        forecaster = UNCALIBRATED
    _check(forecaster)
    return forecaster, plan or wish or own_plan(forecaster)


def _read(where: str | Path) -> Forecasters | Calibration:
    if isinstance(where, str) and where in registered() and not Path(where).exists():
        raise ValueError(f"forecaster={where!r} is a name; give the forecaster: lesa.make_forecaster({where!r})")
    return load(where)


def _check(forecasters: Any) -> None:
    """Refuse what is no forecaster, at once."""
    for forecaster in each(forecasters):
        if isinstance(forecaster, type):
            raise ValueError(
                f"forecaster is the class {forecaster.__name__}; give an instance: {forecaster.__name__}()"
            )
        if isinstance(forecaster, StepPlan):
            raise ValueError("forecaster is a StepPlan; give it as plan=, after a forecaster such as lesa.Taylor(2)")
        if not hasattr(forecaster, "table"):
            raise ValueError(
                "forecaster must be a Calibration, a folder, or have a method table(plan, times), as lesa.Taylor(2), "
                f"not a {type(forecaster).__name__}"
            )


def each(forecasters: Forecasters) -> list[Forecaster]:
    """All forecasters, whether there is one for all streams or one for each."""
    return list(forecasters.values()) if isinstance(forecasters, Mapping) else [forecasters]


def own_plan(forecasters: Forecasters) -> StepPlan:
    """The plan that all of the forecasters bring."""
    plans = {getattr(f, "plan", None) for f in each(forecasters)}
    if len(plans) == 1 and isinstance(plan := plans.pop(), StepPlan):
        return plan
    raise ValueError("say which steps are full: plan=StepPlan.paper(50, interval=7), or how many: speedup=5")
