"""Which row of a buffer each feature takes, and the coefficients by row: computed once for a table."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lesa.runtime.guard import Probes
from lesa.runtime.transfer import to_device
from lesa.tables.table import CoefficientTable


class BufferLayout:
    """A row of a buffer for each full feature that a table uses, and the coefficients by row.

    A feature takes a free row and gives it back after its last use. So reuse takes one row, Taylor of order 2 three,
    and a folded LESA table one for each full step.

    Args:
        table: its non-zero coefficients say which features are needed when.
        probes: the predictions of the full steps, if they are compared with the truth.
        spare: full steps that a revised plan may add; each takes one more row if the table keeps every feature.
        held: (row, full step) of the features that are kept already; they stay where they are.

    Attributes:
        num_rows: rows that are needed at once.
        row_of: the row of each full feature that is used, by its step.
        needed: the full steps that the prediction of each step uses; for predicted steps and for probed ones.
    """

    def __init__(
        self, table: CoefficientTable, probes: Probes | None, spare: int, held: tuple[tuple[int, int], ...]
    ) -> None:
        full, steps = table.plan.full_steps, table.plan.predicted_steps
        coefficients, self._bias = table.coefficients, table.bias
        if probes is not None and len(full) > 1:  # the first full step is never compared
            steps += full
            coefficients = torch.cat([coefficients, probes.coefficients])
            self._bias = torch.cat([self._bias, probes.bias])
        self._index = {step: index for index, step in enumerate(steps)}
        self.needed = {
            step: frozenset(full[slot] for slot in slots)
            for step, slots in zip(steps, _nonzero_columns(coefficients), strict=True)
        }
        self.row_of, rows = self._assign_rows(full, dict(held))
        rows += spare if rows == len(self.row_of) else 0
        self.num_rows = max(rows, 1) if steps else rows  # a bias alone needs one row of zeros, for its shape
        self._by_row = torch.zeros(len(steps), self.num_rows, dtype=torch.float64)
        for slot, step in enumerate(full):
            if step in self.row_of:
                self._by_row[:, self.row_of[step]] += coefficients[:, slot]
        # how many rows from the top each step reads, at least one
        self._extent = [max(row, default=0) + 1 for row in _nonzero_columns(self._by_row)]
        self._parts: dict[Hashable, Tensor] = {}

    def _assign_rows(self, full: tuple[int, ...], held: dict[int, int]) -> tuple[dict[int, int], int]:
        """A row for each full step that another step uses, and the number of rows."""
        last_use = {feature: step for step, features in sorted(self.needed.items()) for feature in features}
        row_of = {step: row for row, step in held.items()}
        occupied = [-1] * (1 + max(held, default=-1))  # the last use of the feature in each row
        for row, step in held.items():
            occupied[row] = last_use.get(step, -1)
        for step in full:
            if step <= max(held.values(), default=-1) or step not in last_use:  # dropped before, or never used
                continue
            # a full step is compared before it is kept, so it may take the row of a feature that it used last
            free = [row for row, last in enumerate(occupied) if last <= step]
            row = free[0] if free else len(occupied)
            occupied[row : row + 1] = [last_use[step]]
            row_of[step] = row
        return row_of, len(occupied)

    def part(self, step: int, count: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [count, rows] of ``step`` and the next ones for the first rows, and bias [count].

        They are on the device of the features. The numbers of all steps are moved at once, at the first call, and every
        part is cut out once: later generations copy nothing, so a GPU can replay them.
        """
        first = self._index[step]
        steps, rows = slice(first, first + count), max(self._extent[first : first + count])
        coefficients = self.cached("all", features, lambda: self._by_row)
        bias = self.cached("bias", features, lambda: self._bias)
        return self.cached((step, count), features, lambda: coefficients[steps, :rows].contiguous()), bias[steps]

    def mean(self, step: int, weights: list[float]) -> tuple[Tensor, float]:
        """The mean of the full step ``step`` and of the predictions after it: coefficients [rows], and its own weight.

        The coefficients leave out the row that the feature of ``step`` will take.
        """
        first, own = self._index.get(step + 1, 0), self.row_of.get(step)
        rest = self._by_row[first : first + len(weights) - 1]
        mean = torch.tensor(weights[1:], dtype=torch.float64) @ rest
        if own is None:
            return mean, weights[0]
        share = weights[0] + float(mean[own])
        mean[own] = 0
        return mean, share

    def cached(self, key: Hashable, features: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns, on the device of the features in the dtype of coefficients; made and moved once."""
        key = key, features.device, features.dtype
        if key not in self._parts:
            self._parts[key] = to_device(make(), features.device, torch.promote_types(features.dtype, torch.float32))
        return self._parts[key]


def _nonzero_columns(rows: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in rows]
