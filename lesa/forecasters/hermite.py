"""HiCache: TaylorSeer with scaled Hermite polynomials in place of the powers.

Source: Feng et al., "HiCache", https://arxiv.org/abs/2508.16984, as in the authors' code. At a predicted step x steps
after the last full one, with the differences D_i there,

    feature = sum_i D_i scale^i H_i(scale x) / i!

where H_i are the physicists' Hermite polynomials (1, 2x, 4x^2 - 2, ...). A straight line is followed at 2 scale^2 of
its slope: half of it at the published scale of 0.5, all of it at sqrt(1/2).
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lesa.arguments import real, whole
from lesa.forecasters.differences import difference_table
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable


@dataclass(frozen=True)
class Hermite(Forecaster):
    """HiCache of some order; the first predictions use as many differences as there are.

    Args:
        order: the highest Hermite polynomial; 0 is reuse.
        scale: the contraction, in (0, 1].
    """

    order: int = 2
    scale: float = 0.5
    needs_times = False

    def __post_init__(self) -> None:
        whole("order", self.order, least=0)
        real("scale", self.scale, above=0, most=1)

    @property
    def reach(self) -> int:
        return self.order + 1

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return difference_table(plan, times, "step", self.order, self._factors)

    def _factors(self, x: float) -> list[float]:
        """``scale^i H_i(scale x) / i!`` for i = 0 ... order."""
        hermite = [1.0, 2 * self.scale * x]
        for i in range(1, self.order):
            hermite.append(2 * self.scale * x * hermite[i] - 2 * i * hermite[i - 1])
        return [self.scale**i * h / math.factorial(i) for i, h in enumerate(hermite[: self.order + 1])]
