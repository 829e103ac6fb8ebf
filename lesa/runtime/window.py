"""A rolling window of the latest features, full or predicted: the memory of a predictor that has no table."""

import copy

import torch
from torch import Tensor

from lesa.plan import StepPlan
from lesa.predictor import LesaPredictor
from lesa_kernels import residual


class FeatureWindow:
    """The closed loop of the paper: every prediction is written back and is the next one's past.

    The window slides through a buffer of twice its length and is moved to the front when it reaches the end, so that it
    is always one piece of memory and a feature is moved once in its life.

    Args:
        predictor: with ``latent="kan"``.
        plan: which steps are full.
        times: the schedule, [steps + 1].
        previous: the window of this generation under the plan that this one replaces, whose memory is taken over.
    """

    def __init__(
        self, predictor: LesaPredictor, plan: StepPlan, times: Tensor, previous: "FeatureWindow | None" = None
    ) -> None:
        self._predictor = copy.deepcopy(predictor)  # moves to the features, and the caller's stays where it is
        self._plan = plan
        self._times = predictor.check_schedule(plan, times)
        self._length = max(predictor.config.windows)
        with torch.no_grad():
            self._gates = predictor.gates(self._times)
        self._buffer: Tensor | None = None
        self._end = 0
        self._latest = -1
        if previous is not None:
            self._predictor, self._gates = previous._predictor, previous._gates
            self._buffer, self._end, self._latest = previous._buffer, previous._end, previous._latest

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; 0 before the first feature."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        """Append the feature of a full step.

        Raises:
            ValueError: if it is no float tensor, or has another shape than those before it.
        """
        if self._buffer is None:
            if not feature.is_floating_point():
                raise ValueError(f"the feature is {feature.dtype}; only features of real numbers are predicted")
            self._buffer = feature.new_empty(2 * self._length, *feature.shape)
            self._predictor = self._predictor.to(feature.device)
            self._gates = self._gates.to(feature.device)
        elif feature.shape != self._buffer.shape[1:]:
            raise ValueError(
                f"the feature of step {step} is {list(feature.shape)}, those kept are {list(self._buffer.shape[1:])}; "
                "another batch or resolution needs a window of its own"
            )
        self._append(step, feature)

    def can_predict(self, step: int) -> bool:
        """Whether the step before is the latest in the window."""
        return self._buffer is not None and not self._plan.is_full(step) and self._latest == step - 1

    def predict(self, step: int) -> Tensor:
        """The prediction of ``step``, [*feature].

        Raises:
            ValueError: if the feature of the step before it is not the latest.
        """
        prediction = self._next(step)
        self._append(step, prediction)
        return prediction

    def _next(self, step: int) -> Tensor:
        if self._buffer is None or self._latest != step - 1:
            raise ValueError(f"the prediction of step {step} is made of the steps before it, up to step {step - 1}")
        window = self._buffer[max(0, self._end - self._length) : self._end]
        stage = self._predictor.config.stage(float(self._times[step]))
        with torch.no_grad():
            return self._predictor.advance(window, stage, self._gates[step])

    def coming(self, step: int) -> None:
        """Each prediction needs the one before it."""
        return None

    def residual(self, step: int, feature: Tensor) -> Tensor | None:
        """Squared error and size, float64 [2], of what would be predicted of a full step."""
        if self._buffer is None or self._latest != step - 1:
            return None
        prediction = self._next(step)
        one = torch.ones(1, dtype=torch.promote_types(feature.dtype, torch.float32), device=feature.device)
        return residual(prediction.unsqueeze(0), one, feature)

    def clear(self) -> None:
        """Forget the features and free their memory."""
        self._buffer, self._end, self._latest = None, 0, -1

    def _append(self, step: int, feature: Tensor) -> None:
        assert self._buffer is not None
        if self._end == len(self._buffer):
            self._buffer[: self._length] = self._buffer[self._length :]
            self._end = self._length
        self._buffer[self._end].copy_(feature)
        self._end += 1
        self._latest = step
