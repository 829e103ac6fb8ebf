"""Whether explicit knots are the uniform ones, which have faster code. It is asked of the numbers, not remembered.

A layer is a function of its parameters and buffers, however these came to be what they are: loaded, copied one by one
into an average of the weights, written in place. A flag beside them would not know.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .reference import uniform_knots

TOLERANCE = 1e-6  # of knots that were computed in float32


class Finding(NamedTuple):
    """What was found of knots: in which state of the tensor, for which grid, and of which numbers."""

    state: tuple[int, int] | None  # None: the numbers tell
    grid: tuple[int, tuple[float, float]]
    numbers: Tensor | None
    uniform: bool


_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # as long as the knots live


def is_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """Whether knots [in, n] are those of the range for every input, to within float32 rounding; waits for a GPU."""
    return bool(_close(grid.double(), _expected(grid, order, grid_range), grid_range))


def runs_uniform(grid: Tensor, order: int, grid_range: tuple[float, float]) -> bool:
    """As :func:`is_uniform`, for every call of a layer: found once for each state of the knots.

    A CPU compares their numbers at every call. For a GPU that would be to wait, so there whoever writes to them has to
    let PyTorch count it, which only ``.data`` does not. Where nothing is known and waiting is impossible, False: the
    general code is right for all knots.
    """
    visible, asked = _is_visible(grid), (order, grid_range)
    if not visible and grid.is_inference():  # nobody counts what is written to it
        return False
    state = None if visible else (grid._version, grid.data_ptr())
    known = _found.get(grid)
    if known is not None and known.grid == asked and known.state == state and _has_numbers(grid, known.numbers):
        return bool(known.uniform)
    if not visible and torch.cuda.is_current_stream_capturing():
        return False
    uniform = is_uniform(grid, order, grid_range)
    _found[grid] = Finding(state, asked, grid.detach().clone() if visible else None, uniform)
    return uniform


def _is_visible(grid: Tensor) -> bool:
    """Whether the host can look at numbers without waiting for a device."""
    return grid.device.type == "cpu"


def _has_numbers(grid: Tensor, numbers: Tensor | None) -> bool:
    return numbers is None or torch.equal(grid, numbers)


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
