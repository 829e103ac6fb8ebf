"""Multistep: what predicts best between evaluations of a model that nothing is known about.

Features and outputs are continued along the line through the last two evaluations, in time. The features go through
the output head, which is exact in what it does with the time; the outputs are those of the second-order method of Adams
and Bashforth. On small models of digits and of pictures the errors of the two partly cancel: their mean is up to 1 dB
nearer to the exact solution than the features alone. Half of the correction, by the idea of UniPC
(https://arxiv.org/abs/2302.04867), adds 1 to 2 dB: the whole of it overshoots, since the evaluation that it is made
with was made on the uncorrected sample. docs/evaluations.md has the numbers.
"""

from dataclasses import dataclass

from torch import Tensor

from lesa.arguments import real
from lesa.forecasters.taylor import Taylor
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable


@dataclass(frozen=True)
class Multistep(Forecaster):
    """A line through the last two evaluations, for steps that are divided into substeps; elsewhere Taylor of order 1.

    Args:
        correction, output_share: as in :class:`Forecaster`, 0 to 1.
    """

    correction: float = 0.5
    output_share: float = 0.5
    reach = 2

    def __post_init__(self) -> None:
        real("correction", self.correction, least=0, most=1)
        real("output_share", self.output_share, least=0, most=1)

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return Taylor(1, "time").table(plan, times)
