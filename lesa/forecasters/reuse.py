"""The plainest forecaster: the last full feature again."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lesa.plan import StepPlan
from lesa.table import CoefficientTable, unroll


@dataclass(frozen=True)
class Reuse:
    """``feature[s] = feature[last full step]``."""

    needs_times: ClassVar[bool] = False
    reach: ClassVar[int] = 1

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return unroll(plan, times, lambda step, rows: rows[step - 1])
