"""Whether explicit knots are uniform, for which there is faster code. The knots are compared; there is no flag.

A layer depends on its buffers, however they were written: loaded, averaged, changed in place. A flag would miss that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .reference import uniform_knots

TOLERANCE = 1e-6  # of knots that were computed in float32


# (state of the tensor, order and range) -> what was found, as long as the knots live
answers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """Whether the knots [in, n] of every input are uniform, within float32 rounding; waits for a GPU."""
    return bool(_close(grid.double(), _expected(grid, order, grid_range), grid_range))


def runs_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """As :func:`is_uniform`, for every call of a layer.

    A CPU compares the knots at every call. A GPU would have to be waited for, so there the answer is kept for each
    state of the tensor: PyTorch counts every write but those through ``.data``. False if nothing is known and waiting
    is impossible: the general code is right for all knots.
    """
    if is_visible(grid):
        return is_uniform(grid, order, grid_range)
    if grid.is_inference():  # its writes are not counted
        return False
    key = grid._version, grid.data_ptr(), order, grid_range
    known: dict[Any, bool] = answers.get(grid, {})
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        known = answers[grid] = {key: is_uniform(grid, order, grid_range)}
    return known[key]


def is_visible(grid: Tensor) -> bool:
    """Whether the host can read numbers without waiting for a device."""
    return grid.device.type == "cpu"


def snapped(grid: Tensor, order: int, grid_range: tuple[float, float]) -> Tensor:
    """The knots in float64; if they are uniform up to rounding, the exact ones. Does not wait for a GPU."""
    exact, expected = grid.double(), _expected(grid, order, grid_range)
    return torch.where(_close(exact, expected, grid_range), expected, exact)


def _expected(grid: Tensor, order: int, grid_range: tuple[float, float]) -> Tensor:
    return uniform_knots(grid.shape[-1] - 2 * order - 1, order, grid_range).to(grid.device)


def _close(exact: Tensor, expected: Tensor, grid_range: tuple[float, float]) -> Tensor:
    """[], whether all knots are the expected ones."""
    allowed = TOLERANCE * (expected.abs() + max(map(abs, grid_range)))
    return ((exact - expected).abs() <= allowed).all()
