"""The best linear combination of the full features, from inner products."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lesa.calibration.gram import RIDGE, GramMatrix
from lesa.plan import StepPlan
from lesa.table import CoefficientTable


@dataclass(frozen=True)
class LeastSquares:
    """``G_AA^-1 G_As``: no linear forecaster has a smaller mean squared error on the calibration features.

    Args:
        gram: inner products of the features of all steps.
        ridge: relative to the mean diagonal of the matrix; keeps nearly equal features from cancelling with huge
            coefficients. A larger one (1e-4) costs almost 1 dB.
        bias: also fit a constant.
    """

    gram: GramMatrix
    ridge: float = RIDGE
    bias: bool = True
    needs_times: ClassVar[bool] = False

    def expected_error(self, table: CoefficientTable) -> Tensor:
        """Relative error [steps] of a table on the calibration features; zero at its full steps."""
        return relative_error(self.gram, table)

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        steps, full = plan.num_steps, len(plan.full_steps)
        coefficients = torch.zeros(len(plan.predicted_steps), full, dtype=torch.float64)
        bias = torch.zeros(len(plan.predicted_steps), dtype=torch.float64)
        for row, step in enumerate(plan.predicted_steps):
            used = [f for f in plan.full_steps if f < step]
            solution = self.gram.solve(used + [steps] * self.bias, step, ridge=self.ridge)
            coefficients[row, : len(used)] = solution[: len(used)]
            if self.bias:
                bias[row] = solution[-1]
        return CoefficientTable(plan, times, coefficients, bias)


def relative_error(gram: GramMatrix, table: CoefficientTable) -> Tensor:
    """What a table makes of the calibration features [steps]: length of the error over length of the true feature."""
    size = gram.matrix.diagonal()[:-1] / gram.count
    return (gram.table_error(table) / size).sqrt()
