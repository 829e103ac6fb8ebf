"""L2P: a learned matrix of coefficients.

Source: Shen et al., "Beyond Fixed Formulas", https://arxiv.org/abs/2604.26365. Trained on the features of all steps
before, and run on what there is of them: features at full steps, its own predictions at the others,

    F(s) = sum_{j < s} weights[s, j] F(j)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll


@dataclass(frozen=True, eq=False)
class L2P(Forecaster):
    """A matrix that was learned elsewhere. It belongs to a number of steps and to the feature it was learned on.

    Args:
        weights: [steps, steps], or [steps - 1, steps - 1] as in the paper, whose first row is step 1 and whose last
            column is the last step but one. Only what lies before a step is read.

    Raises:
        ValueError: for a matrix that is not square, or numbers that are not finite.
    """

    weights: Tensor
    needs_times = False

    def __init__(self, weights: Tensor) -> None:
        weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
            raise ValueError(f"the weights of L2P are a square matrix, not {list(weights.shape)}")
        if not bool(weights.isfinite().all()):
            raise ValueError("the weights of L2P must not hold NaN or infinite numbers")
        object.__setattr__(self, "weights", weights)

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        missing = plan.num_steps - len(self.weights)
        if missing not in (0, 1):
            raise ValueError(
                f"this matrix of L2P is for {len(self.weights)} or {len(self.weights) + 1} steps, the plan has "
                f"{plan.num_steps}; weights learned on another schedule cannot be used"
            )

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            weights = self.weights[step - missing, :step].clone()
            # weights of steps before the first are added to it, so a constant is still predicted
            weights[plan.start] += weights[: plan.start].sum()
            return weights[plan.start :] @ torch.stack(list(rows))

        return unroll(plan, times, rule)
