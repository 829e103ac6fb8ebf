"""The memory of a generation whose steps are divided into substeps: the mean over each step in place of one feature."""

import torch
from torch import Tensor

from lesa.runtime.history import FeatureHistory, Rows
from lesa.tables.memory import IntervalPrediction, SubstepMemory
from lesa.tables.plan import StepPlan
from lesa.tables.substeps import Substeps
from lesa_kernels import combine


class SubstepHistory(SubstepMemory):
    """Keeps features on the fine schedule, and predicts the steps of the sampler's schedule.

    Args:
        history: of the fine schedule.
        substeps: the fine schedule.
        plan: of the sampler's schedule.
        correction, output_share: of the forecaster.
    """

    def __init__(
        self,
        history: FeatureHistory,
        substeps: Substeps,
        plan: StepPlan,
        correction: float = 0.0,
        output_share: float = 0.0,
    ) -> None:
        self.history = history
        self.correction = correction
        self.output_share = output_share
        self.substeps = substeps
        self._plan = plan

    @property
    def num_rows(self) -> int:
        return self.history.num_rows

    @property
    def nbytes(self) -> int:
        return self.history.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        self.history.keep(self.substeps.first[step], feature)

    def can_predict(self, step: int) -> bool:
        return not self._plan.is_full(step) and self.history.can_predict(self.substeps.first[step])

    def prediction_error(self, step: int, feature: Tensor) -> Tensor | None:
        return self.history.prediction_error(self.substeps.first[step], feature)

    def clear(self) -> None:
        self.history.clear()

    def predict(self, step: int) -> Tensor:
        steps = self.substeps.of(step)
        history, coefficients, bias = self.history.rows(steps[0], len(steps))
        weights = self._cached_weights(step, 0)
        return combine(history, (weights @ coefficients).unsqueeze(0), (weights @ bias).unsqueeze(0))[0]

    def predict_interval(self, step: int) -> IntervalPrediction:
        """The predictions of all substeps of this step, with their weights in its output."""
        return self._prediction(step, 0)

    def predict_rest(self, step: int) -> IntervalPrediction | None:
        return self._prediction(step, 1) if len(self.substeps.of(step)) > 1 else None

    def interpolate(self, step: int) -> IntervalPrediction | None:
        slot = self._plan.full_steps.index(step)
        if not self.correction or slot == 0:
            return None
        before, after = (self.substeps.first[full] for full in self._plan.full_steps[slot - 1 : slot + 1])
        times = self.substeps.times
        rows = self.history.between(before, after, times)
        if rows is None:
            return None
        lengths = self.history.cached(("lengths", before), lambda: -times[before : after + 1].diff())
        return self._weighted(range(before, after), rows, lengths)

    def mean(self, step: int) -> tuple[Tensor | None, float]:
        return self.history.mean_with(self.substeps.first[step], self.substeps.weights[step])

    def _prediction(self, step: int, skipped: int) -> IntervalPrediction:
        """The substeps of a step but the first ``skipped``, with their weights in its output."""
        steps = self.substeps.of(step)[skipped:]
        return self._weighted(steps, self.history.rows(steps[0], len(steps)), self._cached_weights(step, skipped))

    def _cached_weights(self, step: int, skipped: int) -> Tensor:
        weights = self.substeps.weights[step][skipped:]
        return self.history.cached(("weights", step, skipped), lambda: torch.tensor(weights, dtype=torch.float64))

    def _weighted(self, steps: range, rows: Rows, weights: Tensor) -> IntervalPrediction:
        history, coefficients, bias = rows
        means = self.history.means(len(history))
        return IntervalPrediction(
            list(steps), history, coefficients, bias, means, self.history.centred, weights, self.substeps
        )
