"""The kept features of one generation: one preallocated buffer, as many rows as are ever needed at once."""

from typing import Protocol

import torch
from torch import Tensor

from lesa.runtime.driver import Coming
from lesa.runtime.guard import Probes
from lesa.table import CoefficientTable
from lesa_kernels import combine, residual, token_means


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
        """The predictions of ``step`` and all steps until the next full one, not yet combined; None: one at a time."""
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

    A feature takes a free row of the buffer and gives it back after its last use, so reuse keeps one feature,
    Taylor of order 2 three, and a folded LESA table all of them. The coefficients are laid out by row beforehand;
    nothing is decided or moved between host and device at a predicted step.

    Args:
        table: its non-zero coefficients say which features are needed when.
        probes: what would be predicted of the full steps, if that is to be compared with the truth.
        spare: full steps that a revised plan may add; each takes a row more where no feature is ever given back.
        previous: the history of this generation under the plan that this table's replaces, whose memory is taken over.
    """

    def __init__(
        self,
        table: CoefficientTable,
        probes: Probes | None = None,
        *,
        spare: int = 0,
        previous: "FeatureHistory | None" = None,
    ) -> None:
        plan = table.plan
        self._table = table
        # A row for each step that uses features: the predicted ones, then the full ones if they are probed.
        self._steps = plan.predicted_steps if probes is None else plan.predicted_steps + plan.full_steps
        coefficients = table.coefficients if probes is None else torch.cat([table.coefficients, probes.coefficients])
        self._used = coefficients != 0
        self._held: dict[int, int] = {} if previous is None else dict(previous._held)  # the slot in each row
        self._row_of, rows = self._assign_rows()
        self.num_rows = rows + (spare if rows == len(self._row_of) else 0)
        by_row = torch.zeros(len(self._used), self.num_rows, dtype=torch.float64)
        for slot, row in self._row_of.items():
            by_row[:, row] += torch.where(self._used[:, slot], coefficients[:, slot], 0)
        used = (set(row.nonzero().flatten().tolist()) for row in self._used)
        self._needed = dict(zip(self._steps, used, strict=True))  # the full features, by step
        self._coefficients = by_row
        self._bias = table.bias if probes is None else torch.cat([table.bias, probes.bias])
        # how many rows from the top each prediction reads; a bias alone reads one, for its shape
        self._extent = [max(used.nonzero().flatten().tolist(), default=0) + 1 for used in by_row != 0]
        self._buffer: Tensor | None = None
        self._means: Tensor | None = None
        if previous is not None and previous._buffer is not None:
            self._take_over(previous._buffer, previous._means)

    def _assign_rows(self) -> tuple[dict[int, int], int]:
        """A row for each full step that some other step uses, and how many rows that takes."""
        steps = torch.tensor(self._steps)
        uses = [steps[used].tolist() for used in self._used.T]
        row_of = {slot: row for row, slot in self._held.items()}  # what is kept already stays where it is
        occupied = [-1] * (1 + max(self._held, default=-1))  # the last use of what each row holds
        for row, slot in self._held.items():
            occupied[row] = max(uses[slot], default=-1)
        for slot, step in enumerate(self._table.plan.full_steps):
            if slot <= max(self._held.values(), default=-1) or not uses[slot]:  # what was given back is gone
                continue
            # a full step is compared before it is kept, so that its feature may take the row of one that it used last
            free = [row for row, last in enumerate(occupied) if last <= step]
            row = free[0] if free else len(occupied)
            occupied[row : row + 1] = [max(uses[slot])]
            row_of[slot] = row
        return row_of, len(occupied)

    def _take_over(self, buffer: Tensor, means: Tensor | None) -> None:
        """The memory of a history before this one; copied only if it has too few rows."""
        if len(buffer) < self.num_rows:
            missing = self.num_rows - len(buffer)
            buffer = torch.cat([buffer, buffer.new_zeros(missing, *buffer.shape[1:])])
            means = None if means is None else torch.cat([means, means.new_zeros(missing, *means.shape[1:])])
        self._buffer, self._means = buffer, means
        self._move_coefficients(buffer)

    def _move_coefficients(self, feature: Tensor) -> None:
        exact = torch.promote_types(feature.dtype, torch.float32)
        self._coefficients = self._coefficients.to(feature.device, exact)
        self._bias = self._bias.to(feature.device, exact)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; 0 before the first feature."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        """Copy the feature of a full step of the plan, if anything will need it."""
        slot = self._table.plan.full_steps.index(step)
        if self._buffer is None:
            self._buffer = feature.new_zeros(self.num_rows, *feature.shape)
            self._move_coefficients(feature)
            if feature.is_cuda:
                # the fused kernel normalises in one pass with them; on a CPU a second pass over a small chunk is free
                self._means = self._buffer.new_zeros(self._buffer.shape[:-1], dtype=torch.float32)
        if slot in self._row_of:
            self._buffer[self._row_of[slot]].copy_(feature)
            if self._means is not None:
                self._means[self._row_of[slot]].copy_(token_means(feature))
            self._held[self._row_of[slot]] = slot

    def can_predict(self, step: int) -> bool:
        """Whether every feature that the prediction of ``step`` uses has been kept."""
        return not self._table.plan.is_full(step) and self._holds_all_for(step)

    def _holds_all_for(self, step: int) -> bool:
        needed = self._needed.get(step)
        return needed is not None and self._buffer is not None and needed <= set(self._held.values())

    def predict(self, step: int) -> Tensor:
        """The prediction of ``step``, [*feature], in one pass over the kept features."""
        coming = self._from(step, 1)
        return combine(coming.history, coming.coefficients, coming.bias)[0]

    def coming(self, step: int) -> Coming:
        """The predictions of ``step`` and all predicted steps after it until the next full one, not yet combined."""
        following = (full for full in self._table.plan.full_steps if full > step)
        return self._from(step, next(following, self._table.plan.num_steps) - step)

    def _from(self, step: int, count: int) -> Coming:
        assert self._buffer is not None, "can_predict comes first"
        first = self._table.plan.predicted_steps.index(step)
        rows = max(self._extent[first : first + count])
        return Coming(
            list(range(step, step + count)),
            self._buffer[:rows],
            self._coefficients[first : first + count, :rows],
            self._bias[first : first + count],
            None if self._means is None else self._means[:rows],
        )

    def residual(self, step: int, feature: Tensor) -> Tensor | None:
        """Squared error and size, float64 [2], of what would be predicted of a full step; None if it is not probed."""
        plan = self._table.plan
        if step == plan.start or len(self._steps) == len(plan.predicted_steps) or not self._holds_all_for(step):
            return None
        assert self._buffer is not None
        at = self._steps.index(step)
        rows = self._extent[at]
        return residual(self._buffer[:rows], self._coefficients[at, :rows], feature, self._bias[at])

    def clear(self) -> None:
        """Forget the features and free their memory."""
        self._buffer = self._means = None
        self._held.clear()
