"""Adams-Bashforth: the polynomial through the latest slopes, integrated from the last full step.

Source: the pool of solvers of Zheng et al., "HyCa", https://arxiv.org/abs/2510.04188, whose second order on even
intervals, 5/2 F(k) - 2 F(k - 1) + 1/2 F(k - 2), this is; here for any order and uneven intervals. The slope at a full
step is the difference to the full step before it over their distance.
"""

from dataclasses import dataclass

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from lesa.arguments import whole
from lesa.forecasters.differences import Variable, check_variable, differences, last_full, positions
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll


@dataclass(frozen=True)
class AdamsBashforth(Forecaster):
    """Adams-Bashforth of some order; the first predictions use as many slopes as there are.

    Args:
        order: how many slopes; 1 is a straight line.
        variable: what is integrated over, ``"step"`` as published or ``"time"``.
    """

    order: int = 2
    variable: Variable = "step"

    def __post_init__(self) -> None:
        whole("order", self.order, least=1)
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
            slopes: list[Tensor] = []
            at: list[float] = []
            for full in reversed(plan.full_steps[: plan.full_steps.index(last) + 1]):
                found = differences(plan, position, rows, full, order=1)
                if len(found) == 2 and len(slopes) < self.order:
                    slopes.append(found[1])
                    at.append(float(position[full]))
            weights = integrals(at, float(position[last]), float(position[step]))
            return torch.stack([rows[last], *(w * s for w, s in zip(weights, slopes, strict=True))]).sum(0)

        return unroll(plan, times, rule)


def integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Of each Lagrange polynomial on ``nodes``, from ``start`` to ``end``."""
    # from start on, where the numbers are small and nothing cancels
    nodes, length = [node - start for node in nodes], end - start
    result = []
    for node in nodes:
        lagrange = Polynomial([1.0])
        for other in nodes:
            if other != node:
                lagrange *= Polynomial([-other, 1.0]) / (node - other)
        result.append(float(lagrange.integ()(length)))
    return result
