"""Forecasters and plans by name, for ``lesa evaluate``.

reuse, taylor:order=2, taylor:order=2,variable=time, hermite     a registered forecaster and its options
default                                                         that of the calibration, or without one of enable
least-squares, path-least-squares                               from the calibration
a folder or repository                                          a predictor

paper:7     the paper's, with interval 7        even:10     10 full steps, evenly spaced in noise level
best:10     10 full steps, the calibration's    own         of a predictor: the one it was fitted for
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lesa.api.choose import UNCALIBRATED, fitted_plan
from lesa.api.folders import load
from lesa.calibration.calibration import Calibration
from lesa.evaluation.methods import Method, predicted
from lesa.forecasters import LeastSquares, PathLeastSquares
from lesa.forecasters.base import Forecasters, as_forecasters
from lesa.forecasters.registry import make_forecaster, registered
from lesa.runtime.plans import Plan
from lesa.tables.plan import StepPlan

DEFAULT = "default"
PAPER_INTERVALS = (5, 7, 10)


def grid(forecasters: Sequence[str], plans: Sequence[str], calibration: Calibration | None = None) -> list[Method]:
    """Every forecaster on every plan.

    Raises:
        ValueError: for a name that means nothing, or one that needs a calibration where there is none.
        FileNotFoundError: for a folder that does not exist.
    """
    made = {name: forecaster_of(name, calibration) for name in forecasters}
    return [
        predicted(name, forecaster, plan_of(plan, calibration, forecaster), plan.replace(":", " "))
        for plan in plans
        for name, forecaster in made.items()
    ]


def default_plans(num_steps: int, calibration: Calibration | None) -> list[str]:
    """The paper's plans, and the best known ones with as many full steps."""
    paper = {n: len(StepPlan.paper(num_steps, n).full_steps) for n in PAPER_INTERVALS}
    best = "even" if calibration is None else "best"
    return [*(f"paper:{n}" for n in paper), *(f"{best}:{count}" for count in dict.fromkeys(paper.values()))]


def forecaster_of(name: str, calibration: Calibration | None = None) -> Forecasters:
    """One forecaster, or one for each stream."""
    kind, _, text = name.partition(":")
    if kind == DEFAULT:
        return UNCALIBRATED if calibration is None else calibration.forecasters()
    measured: dict[str, Callable[[Any], Any]] = {
        "least-squares": lambda m: LeastSquares(m.gram, **options),
        "path-least-squares": lambda m: PathLeastSquares(m.errors, **options),
    }
    if kind in measured or kind in registered():
        options = dict(_option(part, name) for part in text.split(",") if part)
        if kind not in measured:
            return make_forecaster(kind, **options)
        return {stream: measured[kind](m) for stream, m in _known(calibration, name).streams.items()}
    loaded = load(name)
    return loaded.forecasters() if isinstance(loaded, Calibration) else as_forecasters(loaded)


def plan_of(name: str, calibration: Calibration | None, forecaster: Forecasters) -> Plan:
    """A plan, or a function of the times."""
    kind, _, number = name.partition(":")
    if kind == "own":
        return fitted_plan(forecaster)
    if kind not in ("paper", "even", "best") or not number.isdecimal():
        raise ValueError(f"no plan {name!r}; say paper:7 (interval), even:10 or best:10 (full steps), or own")
    if kind == "best":
        known = _known(calibration, name)
        known.plan(full_steps=int(number))  # searched for now, if it was not before: a search is no generation's time
        return known.planner(full_steps=int(number))

    def made(times: Tensor) -> StepPlan:
        return StepPlan.paper(len(times) - 1, int(number)) if kind == "paper" else StepPlan.even(times, int(number))

    return made


def _known(calibration: Calibration | None, name: str) -> Calibration:
    if calibration is None:
        raise ValueError(f"{name} needs a calibration: lesa calibrate MODEL --prompts FILE --out DIR makes one")
    return calibration


def _option(text: str, name: str) -> tuple[str, Any]:
    """``order=2`` as a name and a number, or a string where it is none."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"options of a forecaster are given as {name.split(':')[0]}:name=value, not {name!r}")
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value
