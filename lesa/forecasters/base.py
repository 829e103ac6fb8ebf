"""One forecaster for all streams or one for each, and everything that may be given in place of one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
    """A user's object with ``table(plan, times)``, and ``needs_times`` if it has that.

    An object that needs more than these two is derived from :class:`Forecaster`.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        made: CoefficientTable = self._wrapped.table(plan, times)
        return made

    @property
    def needs_times(self) -> bool:
        return bool(getattr(self._wrapped, "needs_times", True))

    def __repr__(self) -> str:
        return repr(self._wrapped)
