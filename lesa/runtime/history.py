"""The kept features of one generation: one preallocated buffer, as many rows as are ever needed at once."""

import itertools
from typing import Protocol

import torch
from torch import Tensor

from lesa.runtime.driver import Coming
from lesa.runtime.guard import Probes
from lesa.runtime.layout import Layout, Layouts
from lesa.table import CoefficientTable
from lesa_kernels import combine, residual, token_means

CENTRED = (torch.float32, torch.float64)  # dtypes in which a feature is kept without its means; others would round it
CENTRED_FROM = 1 << 13  # elements; for fewer the two operators that it takes cost more than the passes it saves


class Memory(Protocol):
    """What a generation remembers of its features, and what it makes of them."""

    @property
    def nbytes(self) -> int:
        """Bytes held; 0 before the first feature."""
        ...

    def keep(self, step: int, feature: Tensor) -> None:
        """Take the feature of a full step of the plan, by copy."""
        ...

    def can_predict(self, step: int) -> bool:
        """Whether the prediction of ``step`` can be made from what has been kept."""
        ...

    def predict(self, step: int) -> Tensor:
        """The prediction of ``step``, [*feature]."""
        ...

    def coming(self, step: int) -> Coming | None:
        """The predictions of ``step`` and the steps until the next full one, not yet combined; None: one at a time."""
        ...

    def residual(self, step: int, feature: Tensor) -> Tensor | None:
        """What would be predicted of a full step beside its true feature: squared error and size, [2] on the device.

        None if that is not known. To be asked before the feature is kept.
        """
        ...

    def clear(self) -> None:
        """Forget the features and free their memory."""
        ...


class FeatureHistory:
    """Keeps full features as long as a table still needs them, and combines them.

    Where each feature lies and the coefficients by row are laid out beforehand; nothing is decided or moved between
    host and device at a predicted step.

    Args:
        table: its non-zero coefficients say which features are needed when.
        probes: what would be predicted of the full steps, if that is to be compared with the truth.
        spare: full steps that a revised plan may add; each takes a row more where no feature is ever given back.
        previous: the history of this generation under the plan that this table's replaces, whose memory is taken over.
        centre: predictions enter a layer norm, which takes the mean of each token away. On a CPU, large features that
            lose nothing by it are kept without: that saves two passes over every prediction.
        layouts: remembers how tables were laid out, for the next generation; None: nobody does.
    """

    def __init__(
        self,
        table: CoefficientTable,
        probes: Probes | None = None,
        *,
        spare: int = 0,
        previous: "FeatureHistory | None" = None,
        centre: bool = False,
        layouts: Layouts | None = None,
    ) -> None:
        self._plan = table.plan
        self._held: dict[int, int] = {} if previous is None else dict(previous._held)  # the full step in each row
        laid_out = table, probes, spare, tuple(self._held.items())
        self._layout = Layout(*laid_out) if layouts is None else layouts.find(*laid_out)
        self._buffer: Tensor | None = None
        self._features: tuple[Tensor, ...] = ()  # the rows of the buffer
        self._means: Tensor | None = None
        self._centre = centre
        if previous is not None and previous._buffer is not None:
            self._centre = previous._centre  # as the features in it are
            self._take_over(previous._buffer, previous._means)

    @property
    def num_rows(self) -> int:
        """Features that are ever kept at once."""
        return self._layout.num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; 0 before the first feature."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def _take_over(self, buffer: Tensor, means: Tensor | None) -> None:
        """The memory of a history before this one; copied only if it has too few rows."""
        if len(buffer) < self.num_rows:
            missing = self.num_rows - len(buffer)
            buffer = torch.cat([buffer, buffer.new_zeros(missing, *buffer.shape[1:])])
            means = None if means is None else torch.cat([means, means.new_zeros(missing, *means.shape[1:])])
        self._buffer, self._features, self._means = buffer, buffer.unbind(), means

    def keep(self, step: int, feature: Tensor) -> None:
        """Copy the feature of a full step of the plan, if anything will need it.

        Raises:
            ValueError: if it is no float tensor, or has another shape than those before it.
        """
        if self._buffer is None:
            self._buffer = self._make_room(feature)
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

    def _make_room(self, feature: Tensor) -> Tensor:
        """The buffer for features like this one; what is kept of each is decided here."""
        if not feature.is_floating_point():
            raise ValueError(f"the feature is {feature.dtype}; only features of real numbers are predicted")
        buffer = feature.new_zeros(self.num_rows, *feature.shape)
        large = feature.numel() >= CENTRED_FROM
        self._centre = self._centre and large and feature.device.type == "cpu" and feature.dtype in CENTRED
        if feature.is_cuda:  # the fused kernel normalises in one pass with them
            self._means = buffer.new_zeros(buffer.shape[:-1], dtype=torch.float32)
        return buffer

    def can_predict(self, step: int) -> bool:
        """Whether every feature that the prediction of ``step`` uses has been kept."""
        return not self._plan.is_full(step) and self._holds_all_for(step)

    def _holds_all_for(self, step: int) -> bool:
        needed = self._layout.needed.get(step)
        return needed is not None and self._buffer is not None and needed.issubset(self._held.values())

    def predict(self, step: int) -> Tensor:
        """The prediction of ``step``, [*feature], in one pass over the kept features.

        Raises:
            ValueError: if nothing is predicted of it, or what it is made of has not been kept.
        """
        history, coefficients, bias = self._rows(step, 1)
        return combine(history, coefficients, bias)[0]

    def coming(self, step: int) -> Coming:
        """The predictions of ``step`` and the steps after it, not yet combined.

        They end before the next full step, and before one whose features have not been kept.

        Raises:
            ValueError: as :meth:`predict`.
        """
        following = next((full for full in self._plan.full_steps if full > step), self._plan.num_steps)
        steps = list(itertools.takewhile(self._holds_all_for, range(step, following)))
        history, coefficients, bias = self._rows(step, len(steps))
        means = None if self._means is None else self._means[: len(history)]
        return Coming(steps, history, coefficients, bias, means, self._centre)

    def residual(self, step: int, feature: Tensor) -> Tensor | None:
        """Squared error and size, float64 [2], of what would be predicted of a full step; None if it is not probed."""
        if step == self._plan.start or not self._holds_all_for(step):
            return None
        history, coefficients, bias = self._rows(step, 1)
        return residual(history, coefficients[0], feature, bias[0])

    def _rows(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What ``step`` and the next ones are made of: features, coefficients and bias."""
        if self._buffer is None or not self._holds_all_for(step):
            raise ValueError(self._lack(step))
        coefficients, bias = self._layout.part(step, count, self._buffer)
        return self._buffer[: coefficients.shape[1]], coefficients, bias

    def _lack(self, step: int) -> str:
        """Why ``step`` cannot be predicted."""
        needed = self._layout.needed.get(step)
        if needed is None:
            return f"nothing is predicted of step {step}, which is no predicted step of the plan {self._plan}"
        missing = sorted(needed.difference(self._held.values()))
        what = f"the full steps {', '.join(map(str, missing))}" if missing else "a full step"
        return f"the prediction of step {step} is made of the features of {what}, which have to be kept before"

    def clear(self) -> None:
        """Forget the features and free their memory."""
        self._buffer = self._means = None
        self._features = ()
        self._held.clear()
