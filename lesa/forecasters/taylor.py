"""TaylorSeer: a Taylor expansion whose derivatives are differences of the latest full features.

Source: Liu et al., "From Reusing to Forecasting", https://arxiv.org/abs/2503.06923. At a predicted step a distance x
after the last full one, with the differences D_i there, feature = sum_i D_i x^i / i!. Distances count steps.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lesa.arguments import whole
from lesa.forecasters.differences import Variable, check_variable, difference_table
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable


@dataclass(frozen=True)
class Taylor(Forecaster):
    """TaylorSeer of some order; the first predictions use as many differences as there are.

    Args:
        order: the highest derivative; 0 is reuse.
        variable: what distances are measured in, ``"step"`` as published or ``"time"``.
    """

    order: int = 2
    variable: Variable = "step"

    def __post_init__(self) -> None:
        whole("order", self.order, least=0)
        check_variable(self.variable)

    @property
    def needs_times(self) -> bool:
        return self.variable == "time"

    @property
    def reach(self) -> int:
        return self.order + 1

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return difference_table(plan, times, self.variable, self.order, self._factors)

    def _factors(self, x: float) -> list[float]:
        """``x^i / i!`` for i = 0 ... order."""
        return [x**i / math.factorial(i) for i in range(self.order + 1)]
