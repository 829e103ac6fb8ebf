"""The best linear combination of the full features, from inner products."""

import itertools
from bisect import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.arguments import real
from lesa.statistics.gram import RIDGE, GramMatrix
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable


@dataclass(frozen=True)
class LeastSquares(Forecaster):
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
    needs_times = False

    def __post_init__(self) -> None:
        if not isinstance(self.gram, GramMatrix):
            raise ValueError(
                f"gram must be a GramMatrix, not a {type(self.gram).__name__}; of a calibration it is "
                "calibration.streams[component, branch].gram"
            )
        real("ridge", self.ridge, least=0)

    def expected_error(self, table: CoefficientTable) -> Tensor:
        """Relative error [steps] of a table on the calibration features; zero at its full steps."""
        return self.gram.relative_error(table)

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        self.gram.check(plan)
        coefficients = torch.zeros(len(plan.predicted_steps), len(plan.full_steps), dtype=torch.float64)
        bias = torch.zeros(len(plan.predicted_steps), dtype=torch.float64)
        row = 0
        # the steps between two full ones have one system of equations
        for known, steps in itertools.groupby(plan.predicted_steps, lambda step: bisect(plan.full_steps, step)):
            targets = list(steps)
            used = [*plan.full_steps[:known], *[plan.num_steps] * self.bias]
            solution = self.gram.solve(used, targets, ridge=self.ridge)
            rows = slice(row, row + len(targets))
            coefficients[rows, :known] = solution[:, :known]
            if self.bias:
                bias[rows] = solution[:, -1]
            row += len(targets)
        return CoefficientTable(plan, times, coefficients, bias)
