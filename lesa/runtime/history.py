"""The kept features of one generation: one preallocated buffer, as many rows as are ever needed at once."""

import logging
from typing import Protocol

import torch
from torch import Tensor

from lesa.runtime.driver import Coming
from lesa.table import CoefficientTable
from lesa_kernels import combine, token_means

log = logging.getLogger("lesa")


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
    """

    def __init__(self, table: CoefficientTable) -> None:
        self._table = table
        self._used = table.coefficients != 0
        self._row_of, self.num_rows = self._assign_rows()
        by_row = torch.zeros(len(self._used), self.num_rows, dtype=torch.float64)
        for slot, row in self._row_of.items():
            by_row[:, row] += torch.where(self._used[:, slot], table.coefficients[:, slot], 0)
        used = (set(row.nonzero().flatten().tolist()) for row in self._used)
        self._needed = dict(zip(table.plan.predicted_steps, used, strict=True))  # the full features, by predicted step
        self._coefficients, self._bias = by_row, table.bias
        # how many rows from the top each prediction reads; a bias alone reads one, for its shape
        self._extent = [max(used.nonzero().flatten().tolist(), default=0) + 1 for used in by_row != 0]
        self._buffer: Tensor | None = None
        self._means: Tensor | None = None
        self._kept: set[int] = set()

    def _assign_rows(self) -> tuple[dict[int, int], int]:
        """A row for each full step that some predicted step uses, and how many rows that takes."""
        plan = self._table.plan
        predicted = torch.tensor(plan.predicted_steps)
        occupied: list[int] = []  # the last use of what each row holds
        row_of = {}
        for slot, step in enumerate(plan.full_steps):
            uses = predicted[self._used[:, slot]]
            if len(uses) == 0:
                continue
            free = [row for row, last in enumerate(occupied) if last < step]
            row = free[0] if free else len(occupied)
            occupied[row : row + 1] = [int(uses.max())]
            row_of[slot] = row
        return row_of, len(occupied)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; 0 before the first feature."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        """Copy the feature of a full step of the plan, if anything will need it."""
        slot = self._table.plan.full_steps.index(step)
        if self._buffer is None:
            self._buffer = feature.new_zeros(self.num_rows, *feature.shape)
            size, unit = feature.nbytes / 2**20, "MiB"
            log.info("keeping %d features of %.2f %s: %.1f %s", self.num_rows, size, unit, self.num_rows * size, unit)
            exact = torch.promote_types(feature.dtype, torch.float32)
            self._coefficients = self._coefficients.to(feature.device, exact)
            self._bias = self._bias.to(feature.device, exact)
            if feature.is_cuda:
                # the fused kernel normalises in one pass with them; on a CPU a second pass over a small chunk is free
                self._means = self._buffer.new_zeros(self._buffer.shape[:-1], dtype=torch.float32)
        if slot in self._row_of:
            self._buffer[self._row_of[slot]].copy_(feature)
            if self._means is not None:
                self._means[self._row_of[slot]].copy_(token_means(feature))
            self._kept.add(slot)

    def can_predict(self, step: int) -> bool:
        """Whether every feature that the prediction of ``step`` uses has been kept."""
        needed = self._needed.get(step)
        return needed is not None and self._buffer is not None and needed <= self._kept

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

    def clear(self) -> None:
        """Forget the features and free their memory."""
        self._buffer = self._means = None
        self._kept.clear()
