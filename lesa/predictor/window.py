"""The memory of a predictor that has no table: a rolling window of the latest features, full or predicted."""

from collections.abc import Callable

import torch
from torch import Tensor

from lesa.tables.memory import Memory
from lesa.tables.plan import StepPlan
from lesa_kernels import prediction_error

Advance = Callable[[Tensor, int], Tensor]  # (window [k, *feature], step) -> the prediction of that step [*feature]


class FeatureWindow(Memory):
    """The closed loop of the paper: every prediction is written back and is an input of the next one.

    The window slides through a buffer of twice its length and is moved to the front when it reaches the end. So it is
    always contiguous, and each feature is moved once.

    Args:
        advance: makes one prediction from the window.
        length: of the window.
        plan: which steps are full.
        previous: the window of this generation under an earlier plan, whose features are taken over.
    """

    def __init__(self, advance: Advance, length: int, plan: StepPlan, previous: "FeatureWindow | None" = None) -> None:
        self._advance = advance
        self._length = length
        self._plan = plan
        self._buffer: Tensor | None = None
        self._end = 0
        self._latest = -1
        if previous is not None:
            self._buffer, self._end, self._latest = previous._buffer, previous._end, previous._latest

    @property
    def num_rows(self) -> int:
        return 2 * self._length

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        if self._buffer is None:
            if not feature.is_floating_point():
                raise ValueError(f"the feature is {feature.dtype}; only features of real numbers are predicted")
            self._buffer = feature.new_empty(2 * self._length, *feature.shape)
        elif feature.shape != self._buffer.shape[1:]:
            raise ValueError(
                f"the feature of step {step} is {list(feature.shape)}, those kept are {list(self._buffer.shape[1:])}; "
                "another batch or resolution needs a window of its own"
            )
        self._append(step, feature)

    def can_predict(self, step: int) -> bool:
        return self._buffer is not None and not self._plan.is_full(step) and self._latest == step - 1

    def predict(self, step: int) -> Tensor:
        prediction = self._following(step)
        self._append(step, prediction)
        return prediction

    def prediction_error(self, step: int, feature: Tensor) -> Tensor | None:
        if self._buffer is None or self._latest != step - 1:
            return None
        prediction = self._following(step)
        one = torch.ones(1, dtype=torch.promote_types(feature.dtype, torch.float32), device=feature.device)
        return prediction_error(prediction.unsqueeze(0), one, feature)

    def clear(self) -> None:
        self._buffer, self._end, self._latest = None, 0, -1

    def _following(self, step: int) -> Tensor:
        if self._buffer is None or self._latest != step - 1:
            raise ValueError(f"the prediction of step {step} is made of the steps before it, up to step {step - 1}")
        with torch.no_grad():
            return self._advance(self._buffer[max(0, self._end - self._length) : self._end], step)

    def _append(self, step: int, feature: Tensor) -> None:
        assert self._buffer is not None
        if self._end == len(self._buffer):
            self._buffer[: self._length] = self._buffer[self._length :]
            self._end = self._length
        self._buffer[self._end].copy_(feature)
        self._end += 1
        self._latest = step
