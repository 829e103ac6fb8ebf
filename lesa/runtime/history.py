"""The memory of a generation whose predictions follow a table: one buffer with as many rows as are needed at once."""

import itertools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lesa.runtime.buffer_layout import BufferLayout
from lesa.runtime.guard import Probes
from lesa.tables.memory import IntervalPrediction, Memory
from lesa.tables.table import CoefficientTable
from lesa_kernels import combine, prediction_error, token_means

Rows = tuple[Tensor, Tensor, Tensor]  # features, coefficients and bias
CENTRED = (torch.float32, torch.float64)  # dtypes in which a feature is kept without its means; others would round it
CENTRED_FROM = 1 << 13  # elements; for fewer the two operators that it takes cost more than the passes it saves


class FeatureHistory(Memory):
    """Keeps full features as long as a table needs them, and combines them.

    The row of each feature and the coefficients by row are computed once for a table. A predicted step decides nothing
    and moves nothing between host and device.

    Args:
        table: its non-zero coefficients say which features are needed when.
        probes: the predictions of the full steps, if they are compared with the truth.
        spare: full steps that a revised plan may add; each takes one more row if the table keeps every feature.
        previous: the history of this generation under an earlier plan, whose features are taken over.
        centre: predictions enter a layer norm, so the channel mean of a token has no effect. On a CPU large features
            are kept without it, which saves two passes over each prediction.
        make_layout: :class:`BufferLayout` or a cache of it; computing one takes as long as a step of a small model.
    """

    def __init__(
        self,
        table: CoefficientTable,
        probes: Probes | None = None,
        *,
        spare: int = 0,
        previous: "FeatureHistory | None" = None,
        centre: bool = False,
        make_layout: Callable[..., BufferLayout] = BufferLayout,
    ) -> None:
        self._plan = table.plan
        self._held: dict[int, int] = {} if previous is None else dict(previous._held)  # the full step in each row
        self._layout = make_layout(table, probes, spare, tuple(self._held.items()))
        self._buffer: Tensor | None = None
        self._features: tuple[Tensor, ...] = ()  # the rows of the buffer
        self._means: Tensor | None = None
        self._centre = centre
        if previous is not None and previous._buffer is not None:
            self._centre = previous._centre  # as the features in it are
            self._take_over(previous._buffer, previous._means)

    @property
    def num_rows(self) -> int:
        return self._layout.num_rows

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def _take_over(self, buffer: Tensor, means: Tensor | None) -> None:
        """Use the buffer of an earlier history; it is copied only if it has too few rows."""
        if len(buffer) < self.num_rows:
            missing = self.num_rows - len(buffer)
            buffer = torch.cat([buffer, buffer.new_zeros(missing, *buffer.shape[1:])])
            means = None if means is None else torch.cat([means, means.new_zeros(missing, *means.shape[1:])])
        self._buffer, self._features, self._means = buffer, buffer.unbind(), means

    def keep(self, step: int, feature: Tensor) -> None:
        if self._buffer is None:
            self._buffer = self._allocate(feature)
            self._features = self._buffer.unbind()
        elif feature.shape != self._buffer.shape[1:]:
            raise ValueError(
                f"the feature of step {step} is {list(feature.shape)}, those kept are {list(self._buffer.shape[1:])}; "
                "another batch or resolution needs a history of its own"
            )
        row = self._layout.row_of.get(step)
        if row is not None:
            if self._centre:
                torch.sub(feature, feature.mean(-1, keepdim=True), out=self._features[row])
            else:
                self._features[row].copy_(feature)
            if self._means is not None:
                self._means[row].copy_(token_means(feature))
            self._held[row] = step

    def _allocate(self, feature: Tensor) -> Tensor:
        """The buffer for features like this one, and whether they are kept centred or with their means."""
        if not feature.is_floating_point():
            raise ValueError(f"the feature is {feature.dtype}; only features of real numbers are predicted")
        buffer = feature.new_zeros(self.num_rows, *feature.shape)
        large = feature.numel() >= CENTRED_FROM
        self._centre = self._centre and large and feature.device.type == "cpu" and feature.dtype in CENTRED
        if feature.is_cuda:  # the fused kernel normalises in one pass with them
            self._means = buffer.new_zeros(buffer.shape[:-1], dtype=torch.float32)
        return buffer

    def can_predict(self, step: int) -> bool:
        return not self._plan.is_full(step) and self._holds_all_for(step)

    def _holds_all_for(self, step: int) -> bool:
        needed = self._layout.needed.get(step)
        return needed is not None and self._buffer is not None and needed.issubset(self._held.values())

    def predict(self, step: int) -> Tensor:
        history, coefficients, bias = self.rows(step, 1)
        return combine(history, coefficients, bias)[0]

    def predict_interval(self, step: int) -> IntervalPrediction:
        """The predictions until the next full step, or until one whose features have not been kept.

        Raises:
            ValueError: as :meth:`predict`.
        """
        following = next((full for full in self._plan.full_steps if full > step), self._plan.num_steps)
        steps = list(itertools.takewhile(self._holds_all_for, range(step, following)))
        history, coefficients, bias = self.rows(step, len(steps))
        return IntervalPrediction(steps, history, coefficients, bias, self.means(len(history)), self._centre)

    def prediction_error(self, step: int, feature: Tensor) -> Tensor | None:
        if step == self._plan.start or not self._holds_all_for(step):
            return None
        history, coefficients, bias = self.rows(step, 1)
        return prediction_error(history, coefficients[0], feature, bias[0])

    @property
    def centred(self) -> bool:
        """Whether the features are kept without the means of their tokens."""
        return self._centre

    def means(self, count: int) -> Tensor | None:
        """The means of the tokens of the first rows, if they are kept."""
        return None if self._means is None else self._means[:count]

    def rows(self, step: int, count: int) -> Rows:
        """Features, coefficients and bias of ``step`` and the next ones.

        Raises:
            ValueError: if a feature that they need has not been kept.
        """
        if self._buffer is None or not self._holds_all_for(step):
            raise ValueError(self._why_not(step))
        coefficients, bias = self._layout.part(step, count, self._buffer)
        return self._buffer[: coefficients.shape[1]], coefficients, bias

    def between(self, before: int, after: int, times: Tensor) -> Rows | None:
        """The features at the steps from ``before`` up to ``after``, interpolated between these two full steps.

        As :meth:`rows`, linear in ``times`` [steps + 1]. None if one of the two features is not kept.
        """
        row, held = self._layout.row_of, set(self._held.values())
        if self._buffer is None or not {before, after} <= held:
            return None

        def make() -> Tensor:
            share = (times[before] - times[before:after]) / (times[before] - times[after])
            made = torch.zeros(after - before, max(row[before], row[after]) + 1, dtype=torch.float64)
            made[:, row[before]], made[:, row[after]] = 1 - share, share
            return made

        coefficients = self._layout.cached(("between", before), self._buffer, make)
        return self._buffer[: coefficients.shape[1]], coefficients, coefficients.new_zeros(len(coefficients))

    def mean_with(self, step: int, weights: list[float]) -> tuple[Tensor | None, float]:
        """The mean of the full step ``step`` and the predictions after it, before that step has run.

        Args:
            weights: of the step itself and of each prediction.

        Returns:
            What is known of it [*feature], None: nothing; and the weight of the feature of ``step`` in it.
        """
        coefficients, own = self._layout.mean(step, weights)
        if self._buffer is None or not bool(coefficients.any()):
            return None, own
        rows = self._layout.cached(("mean", step), self._buffer, lambda: coefficients[None])
        return combine(self._buffer[: rows.shape[1]], rows)[0], own

    def cached(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """A small tensor in the dtype of coefficients on the device of the features, made once for a table."""
        assert self._buffer is not None, "a feature was kept before"
        return self._layout.cached(key, self._buffer, make)

    def _why_not(self, step: int) -> str:
        """Why ``step`` cannot be predicted."""
        needed = self._layout.needed.get(step)
        if needed is None:
            return f"nothing is predicted of step {step}, which is no predicted step of the plan {self._plan}"
        missing = sorted(needed.difference(self._held.values()))
        what = f"the full steps {', '.join(map(str, missing))}" if missing else "a full step"
        return f"the prediction of step {step} is made of the features of {what}, which have to be kept before"

    def clear(self) -> None:
        self._buffer = self._means = None
        self._features = ()
        self._held.clear()
