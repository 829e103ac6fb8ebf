"""The calibrator: cache-dit decides which steps are full, a forecaster predicts the others."""

from typing import Any

import torch
from torch import Tensor

from lesa.adapters.cache_dit.compat import CalibratorBase
from lesa.adapters.cache_dit.tables import Tables
from lesa.runtime.transfer import to_device
from lesa_kernels import combine

FIRST_ROWS = 4  # initial rows of a buffer that grows


class GrowingHistory:
    """One tensor that cache-dit predicts in one generation, such as the residual of a list of blocks.

    The plan is not known beforehand, so at each full step the table is made again for the full steps so far. Features
    are kept in a ring of as many rows as the forecaster uses; if that is not known, in a buffer that is doubled when it
    is full.
    """

    def __init__(self, tables: Tables, times: Tensor) -> None:
        self._tables = tables
        self._times = times
        self._ring = tables.reach or len(times)
        self._full: list[int] = []
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the kept features."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        """Copy the feature of a full step."""
        slot = len(self._full)
        self._full.append(step)
        self._make_room(slot, feature)[slot % self._ring].copy_(feature)
        table = self._tables.table(self._full, self._times)
        self._row_of = {step: row for row, step in enumerate(table.plan.predicted_steps)}
        kept = range(max(0, slot + 1 - self._ring), slot + 1)
        by_row = torch.zeros(len(table.coefficients), len(kept), dtype=torch.float64)
        by_row[:, [slot % self._ring for slot in kept]] = table.coefficients[:, kept.start :]
        exact = torch.promote_types(feature.dtype, torch.float32)
        self._coefficients, self._bias = (to_device(part, feature.device, exact) for part in (by_row, table.bias))

    def _make_room(self, slot: int, feature: Tensor) -> Tensor:
        """The buffer, with a row for the feature of ``slot``."""
        if self._buffer is None:
            self._buffer = feature.new_empty(min(self._ring, FIRST_ROWS), *feature.shape)
        rows = len(self._buffer)
        if rows <= slot < self._ring:
            more = feature.new_empty(min(self._ring, 2 * rows) - rows, *feature.shape)
            self._buffer = torch.cat([self._buffer, more])
        return self._buffer

    def predict(self, step: int) -> Tensor:
        """The prediction of a step, [*feature]."""
        assert self._buffer is not None, "keep comes first"
        row, kept = self._row_of[step], self._coefficients.shape[1]
        return combine(self._buffer[:kept], self._coefficients[row : row + 1], self._bias[row : row + 1])[0]


class ForecasterCalibrator(CalibratorBase):
    """cache-dit calls ``mark_step_begin`` at every step, then ``update`` at a full one or ``approximate``.

    It makes a calibrator for each list of blocks and branch of guidance, and names the tensors in its calls.

    Raises:
        ValueError: for more steps than the schedule has.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._histories: dict[str, GrowingHistory] = {}
        self._times: Tensor | None = None
        self._step = -1

    def reset_cache(self, *args: Any, **kwargs: Any) -> None:
        self._histories.clear()
        self._times = None
        self._step = -1

    def mark_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._times is None:
            start, self._times = self._tables.begin()
            self._step = start - 1
        self._step += 1
        if self._step >= len(self._times) - 1:
            raise ValueError(
                f"cache-dit counts a step {self._step} on a schedule of {len(self._times) - 1} steps; where the "
                "transformer alone is cached, it has to be told how many there are: "
                f"DBCacheConfig(num_inference_steps={len(self._times) - 1})"
            )

    def update(self, Y: Tensor, name: str = "default") -> None:  # noqa: N803
        assert self._times is not None, "mark_step_begin comes first"
        if name not in self._histories:
            self._histories[name] = GrowingHistory(self._tables, self._times)
        self._histories[name].keep(self._step, Y.detach())

    def approximate(self, name: str = "default") -> Tensor:
        return self._histories[name].predict(self._step)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept features."""
        return sum(history.nbytes for history in self._histories.values())

    def __repr__(self) -> str:
        return f"ForecasterCalibrator({self._tables.forecaster!r})"
