"""The contract of a forecaster: it turns a plan and a schedule into a table of coefficients."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping

from torch import Tensor

from lesa.tables.memory import Memory
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable

Stream = tuple[str, str]  # (component, branch), such as ("transformer", "cond")


class Forecaster(ABC):
    """Base class of all forecasters. Only :meth:`table` has to be written; the rest has defaults.

    A class attribute is enough to override one of the properties: ``needs_times = False``.

    Attributes:
        correction: where steps are divided into substeps: at each full step the steps since the one before are made
            again by interpolation, and this share of the difference is added to the sample.
        output_share: where steps are divided into substeps: the share of the mean output that is taken from the line
            through the last two true outputs, in place of the outputs of predicted features.
    """

    correction: float = 0.0
    output_share: float = 0.0

    @abstractmethod
    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        """The coefficients of every predicted step of a plan.

        Args:
            plan: which steps are full.
            times: noise levels [steps + 1] float64, from 1 (noise) to 0 (image).

        Raises:
            ValueError: if this plan or schedule cannot be served.
        """

    @property
    def needs_times(self) -> bool:
        """Whether the coefficients depend on the times; if not, a schedule that is not known can be served."""
        return True

    @property
    def reach(self) -> int | None:
        """How many of the latest full features a prediction uses, for any plan; None: possibly all."""
        return None

    @property
    def plan(self) -> StepPlan | None:
        """The plan that it was made for, which :func:`lesa.enable` uses if none is given."""
        return None

    @property
    def only_own_plan(self) -> bool:
        """Whether it serves no plan but its own, so that a guard cannot ask what it would predict of full steps."""
        return False

    @property
    def state(self) -> Hashable:
        """Changes when :meth:`table` would return other numbers for the same plan and times, such as new weights."""
        return None

    def check_plan(self, plan: StepPlan) -> None:
        """Called before the first step: raise a ValueError if this plan certainly cannot be served."""
        return None

    def check_model(self, model: Mapping[str, str]) -> None:
        """Called before the first step: raise a ValueError if it was calibrated on another model.

        ``model`` has the class and a hash of the configuration of each transformer, by component.
        """
        return None

    def limited(self, history: int) -> "Forecaster":
        """A forecaster whose predictions use only the latest ``history`` full features."""
        return LimitedForecaster(self, history)

    def expected_error(self, table: CoefficientTable) -> Tensor | None:
        """Relative error [steps] that a calibration measured for a table; None: it is not known."""
        return None

    def make_memory(self, plan: StepPlan, times: Tensor, previous: Memory | None) -> Memory | None:
        """A memory that predicts without a table; None: predictions are linear, so the table is enough.

        Args:
            plan: which steps are full.
            times: noise levels [steps + 1].
            previous: the memory of this generation under an earlier plan, whose features are taken over.
        """
        return None


class LimitedForecaster(Forecaster):
    """Another forecaster with its tables cut to the latest full features: :meth:`CoefficientTable.limited`."""

    def __init__(self, forecaster: Forecaster, history: int) -> None:
        self._forecaster = forecaster
        self._history = history
        self.correction, self.output_share = forecaster.correction, forecaster.output_share

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return self._forecaster.table(plan, times).limited(self._history)

    @property
    def needs_times(self) -> bool:
        return self._forecaster.needs_times

    @property
    def reach(self) -> int | None:
        known = self._forecaster.reach
        return self._history if known is None else min(known, self._history)

    @property
    def plan(self) -> StepPlan | None:
        return self._forecaster.plan

    @property
    def only_own_plan(self) -> bool:
        return self._forecaster.only_own_plan

    @property
    def state(self) -> Hashable:
        return self._forecaster.state

    def check_plan(self, plan: StepPlan) -> None:
        self._forecaster.check_plan(plan)

    def check_model(self, model: Mapping[str, str]) -> None:
        self._forecaster.check_model(model)

    def expected_error(self, table: CoefficientTable) -> Tensor | None:
        return self._forecaster.expected_error(table)

    def make_memory(self, plan: StepPlan, times: Tensor, previous: Memory | None) -> Memory | None:
        return self._forecaster.make_memory(plan, times, previous)

    def __repr__(self) -> str:
        return repr(self._forecaster)
