"""One forecaster for all streams or one for each, and everything that may be given in place of one."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable

Forecasters = Forecaster | Mapping[Stream, Forecaster]


def forecaster_list(forecasters: Forecasters) -> list[Forecaster]:
    """All forecasters, whether there is one for all streams or one for each."""
    return list(forecasters.values()) if isinstance(forecasters, Mapping) else [forecasters]


def as_forecasters(given: Any) -> Forecasters:
    """:func:`as_forecaster` of one object, or of each value of a mapping."""
    if isinstance(given, Mapping):
        return {stream: as_forecaster(forecaster) for stream, forecaster in given.items()}
    return as_forecaster(given)


def as_forecaster(given: Any) -> Forecaster:
    """A forecaster from anything that has a method ``table(plan, times)``.

    Raises:
        ValueError: for anything else; it says what to give.
    """
    if isinstance(given, Forecaster):
        return given
    if isinstance(given, type):
        raise ValueError(f"forecaster is the class {given.__name__}; give an instance: {given.__name__}()")
    if isinstance(given, StepPlan):
        raise ValueError("forecaster is a StepPlan; give it as plan=, after a forecaster such as lesa.Taylor(2)")
    if isinstance(given, CoefficientTable):
        return FixedTable(given)
    if not callable(getattr(given, "table", None)):
        raise ValueError(
            "forecaster must be a Calibration, a folder, or have a method table(plan, times), as lesa.Taylor(2), "
            f"not a {type(given).__name__}"
        )
    return WrappedForecaster(given)


class FixedTable(Forecaster):
    """A table that was made beforehand: it serves its own plan and schedule only."""

    only_own_plan = True

    def __init__(self, table: CoefficientTable) -> None:
        self._table = table

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return self._table.table(plan, times)

    @property
    def plan(self) -> StepPlan | None:
        return self._table.plan

    def check_plan(self, plan: StepPlan) -> None:
        self._table.table(plan, self._table.times)

    def __repr__(self) -> str:
        return repr(self._table)


class WrappedForecaster(Forecaster):
    """A user's object with ``table(plan, times)`` that is not derived from :class:`Forecaster`.

    Attributes of the names that :class:`Forecaster` has are used where they exist; ``expected_error`` may be a number.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        made: CoefficientTable = self._wrapped.table(plan, times)
        return made

    @property
    def needs_times(self) -> bool:
        return bool(getattr(self._wrapped, "needs_times", True))

    @property
    def reach(self) -> int | None:
        return getattr(self._wrapped, "reach", None)

    @property
    def plan(self) -> StepPlan | None:
        plan = getattr(self._wrapped, "plan", None)
        return plan if isinstance(plan, StepPlan) else None

    @property
    def state(self) -> Hashable:
        if isinstance(self._wrapped, nn.Module):
            return parameter_versions(self._wrapped)
        return getattr(self._wrapped, "state", None)

    def limited(self, history: int) -> Forecaster:
        own = getattr(self._wrapped, "limited", None)
        return super().limited(history) if own is None else as_forecaster(own(history))

    def expected_error(self, table: CoefficientTable) -> Tensor | None:
        known = getattr(self._wrapped, "expected_error", None)
        if known is None:
            return None
        return known(table) if callable(known) else torch.full((table.plan.num_steps,), float(known))

    def __repr__(self) -> str:
        return repr(self._wrapped)


def parameter_versions(module: nn.Module) -> Hashable:
    """Changes when a parameter is replaced or written to."""
    return tuple((id(p), p._version) for p in module.parameters() if not p.is_inference())
