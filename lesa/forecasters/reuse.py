"""Reuse: the last full feature again."""

from dataclasses import dataclass

from torch import Tensor

from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll


@dataclass(frozen=True)
class Reuse(Forecaster):
    """``feature[s] = feature[last full step]``."""

    needs_times = False
    reach = 1

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return unroll(plan, times, lambda step, rows: rows[step - 1])
