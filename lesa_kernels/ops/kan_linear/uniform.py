"""Whether explicit knots are the uniform ones, which have faster code. It is asked of the numbers, not remembered.

A layer is a function of its parameters and buffers, however these came to be what they are: loaded, copied one by one
into an average of the weights, written in place. A flag beside them would not know.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .reference import uniform_knots

TOLERANCE = 1e-6  # of knots that were computed in float32


# (state of the tensor, order and range) -> what was found, as long as the knots live
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """Whether knots [in, n] are those of the range for every input, to within float32 rounding; waits for a GPU."""
    return bool(_close(grid.double(), _expected(grid, order, grid_range), grid_range))


def runs_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """As :func:`is_uniform`, for every call of a layer.

    A CPU compares the knots at every call. A GPU would have to be waited for, so there the answer is kept for each
    state of the tensor: PyTorch counts every write but those through ``.data``. False if nothing is known and waiting
    is impossible: the general code is right for all knots.
    """
    if _is_visible(grid):
        return is_uniform(grid, order, grid_range)
    if grid.is_inference():  # its writes are not counted
        return False
    key = grid._version, grid.data_ptr(), order, grid_range
    known: dict[Any, bool] = _found.get(grid, {})
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        known = _found[grid] = {key: is_uniform(grid, order, grid_range)}
    return known[key]


def _is_visible(grid: Tensor) -> bool:
    """Whether the host can read numbers without waiting for a device."""
    return grid.device.type == "cpu"


def snapped(grid: Tensor, order: int, grid_range: tuple[float, float]) -> Tensor:
    """The same knots in float64, the uniform ones exactly if they are those but for rounding; nothing waits."""
    exact, expected = grid.double(), _expected(grid, order, grid_range)
    return torch.where(_close(exact, expected, grid_range), expected, exact)


def _expected(grid: Tensor, order: int, grid_range: tuple[float, float]) -> Tensor:
    return uniform_knots(grid.shape[-1] - 2 * order - 1, order, grid_range).to(grid.device)


def _close(exact: Tensor, expected: Tensor, grid_range: tuple[float, float]) -> Tensor:
    """[], whether all are."""
    allowed = TOLERANCE * (expected.abs() + max(map(abs, grid_range)))
    return ((exact - expected).abs() <= allowed).all()
