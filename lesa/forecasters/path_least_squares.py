"""Least squares along the path: coefficients whose errors cancel in the sample.

A solver adds up its steps, so at a full step the sample is off by the sum of all earlier errors, each times the length
of its step. With ``y_sj`` the output error of feature j at step s (:mod:`lesa.statistics.output_errors`) and
``e_s = sum_j c_sj y_sj``, the coefficients of all steps of a plan together minimise

    sum_s |d_s e_s|^2  +  path * sum_f w_f | sum_{s < f} d_s e_s |^2        f: every full step, and the end

where every prediction is as long as the true feature, ``sum_j c_sj a_sj = 1``; w_f is 1, and 5 for the end. Without
the second sum (``path=0``) each step is fitted alone and errors of one sign add up: on the demo model that costs 3 to
7 dB at any budget.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.statistics.output_errors import OutputErrorGram, path_weights
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable

RIDGE = 1e-6  # relative to the mean square of the outputs


@dataclass(frozen=True)
class PathLeastSquares(Forecaster):
    """The table with the smallest error in the sample.

    Args:
        errors: from :func:`lesa.calibrate`, or ``OutputErrorGram.from_gram`` of a plain Gram matrix.
        path: weight of the accumulated errors; from 0.3 to 3 the demo's images are within 1 dB.
        ridge: on the squares of the coefficients, relative to the mean square of the outputs.
        history: how many of the latest full features a prediction may use; None: all.
    """

    errors: OutputErrorGram
    path: float = 1.0
    ridge: float = RIDGE
    history: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.errors, OutputErrorGram):
            raise ValueError(
                f"errors must be an OutputErrorGram, not a {type(self.errors).__name__}; of a calibration they are "
                "calibration.errors((component, branch)), of a GramMatrix OutputErrorGram.from_gram(gram)"
            )
        real("path", self.path, least=0)
        real("ridge", self.ridge, least=0)
        if self.history is not None:
            whole("history", self.history, least=1)

    def limited(self, history: int) -> "PathLeastSquares":
        """With predictions from the latest ``history`` full features only."""
        return dataclasses.replace(self, history=min(history, self.history or history))

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        target, used, coefficients, _ = self._solve(plan, times)
        dense = torch.zeros(plan.num_steps, plan.num_steps, dtype=torch.float64)
        dense[target, used] = coefficients
        return CoefficientTable(plan, times, dense[list(plan.predicted_steps)][:, list(plan.full_steps)])

    def cost(self, plan: StepPlan, times: Tensor) -> float:
        """The minimum, which the search of plans compares."""
        return self._solve(plan, times)[3]

    def _solve(self, plan: StepPlan, times: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Target and used step of each coefficient, the coefficients, and the cost."""
        gram = self.errors
        gram.check(plan)
        if not plan.predicted_steps:
            return *torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.float64), 0.0
        target, used = self._unknowns(plan)
        power = float(gram.power.mean())
        if power == 0:  # the output is zero for any coefficients
            latest = torch.tensor([max(f for f in plan.full_steps if f < int(step)) for step in target])
            return target, used, (used == latest).double(), 0.0
        weights = path_weights(plan, times, self.path)
        system = gram.products(target, used) * weights[target[:, None], target]
        system.diagonal().add_(self.ridge * power * weights.diagonal()[target].clamp(min=1e-12))
        predicted = torch.tensor(plan.predicted_steps)
        # the constraint: the length of each step's prediction
        own = target == predicted[:, None]
        lengths = torch.where(own, gram.length(target, used), 0.0)  # [P, unknowns]
        # if all features of a step are zero, the coefficients add up to 1 instead
        lengths = torch.where((lengths.abs().amax(1, keepdim=True) > 0), lengths, own.double())
        # scaled to a unit diagonal, since unknowns differ by the squares of the step lengths
        scale = system.diagonal().rsqrt()
        factor, failed = torch.linalg.cholesky_ex(system * scale[:, None] * scale)
        if failed or not bool(scale.isfinite().all()):
            raise ValueError("these are no inner products of errors; calibrate again")
        towards = torch.cholesky_solve((lengths * scale).T, factor) * scale[:, None]
        multipliers, failed = torch.linalg.solve_ex(lengths @ towards, torch.ones(len(predicted), dtype=torch.float64))
        if failed or not bool(multipliers.isfinite().all()):
            raise ValueError("these errors have lengths that nothing can keep; calibrate again")
        return target, used, towards @ multipliers, float(multipliers.sum())

    def _unknowns(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """All (predicted step, earlier full step) within the history."""
        full = plan.full_steps
        chosen = [
            (step, f)
            for step in plan.predicted_steps
            for f in [f for f in full if f < step][-(self.history or plan.num_steps) :]
        ]
        target, used = torch.tensor(chosen).T
        return target, used
