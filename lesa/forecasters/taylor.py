"""TaylorSeer: a Taylor expansion whose derivatives are differences of the latest full features.

Source: Liu et al., "From Reusing to Forecasting", https://arxiv.org/abs/2503.06923. At a predicted step a distance x
after the last full one, with the differences D_i there, feature = sum_i D_i x^i / i!. Distances count steps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.arguments import whole
from lesa.forecasters.differences import Variable, check_variable, differences, last_full, positions
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll


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
        position = positions(plan, times, self.variable)

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            last = last_full(plan, step)
            x = position[step] - position[last]
            derivatives = differences(plan, position, rows, last, self.order)
            return torch.stack([d * x**i / math.factorial(i) for i, d in enumerate(derivatives)]).sum(0)

        return unroll(plan, times, rule)
