"""The KAN layer and its gradients on a CPU: a tile of rows at a time, whose bases stay in the cache.

The reference makes some thirty passes over tensors [rows, in, C], which are as many trips to memory. Here the bases of
a tile are laid out [in, C, rows]: every elementwise operation runs along neighbouring rows, and flattened to
[in * C, rows] the tile is multiplied by ``spline_weight`` [out, in * C] as that lies in memory. For 4,096 rows, 256
inputs and outputs and 8 bases in float32 one core of a Xeon takes 51 ms instead of 484, 28 of them the product itself.

On uniform knots the bases of order k are shifts of one even function. In intervals from its middle, with
``s = max((k + 1) / 2 - |e|, 0)``, it is ``(s^k - (k + 1) max(s - 1, 0)^k) / k!`` for k = 1, 2, 3 (the truncated powers
of kernels.py). Derivatives are differences of the bases one order below, ``B'_{g,k} = k B_{g,k-1} / (t_{g+k} - t_g) -
k B_{g+1,k-1} / (t_{g+k+1} - t_{g+1})``, on any knots.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ORDERS = (1, 2, 3)
# Numbers in a tile for each thread. In float32 it is 1 MiB, and a few of them fit into a second-level cache of 2; from
# a quarter to twice of this the time is the same to 10 %. With fewer rows the matrix products would be slow.
TILE = 1 << 18
FEWEST_ROWS = 32


@dataclass(frozen=True)
class Grid:
    """Where the splines of a layer live: the same uniform knots for all inputs, or ``knots`` [in, C + order + 1]."""

    bases: int
    order: int
    grid_range: tuple[float, float]
    knots: Tensor | None = None

    def expand(self, x: Tensor) -> Tensor:
        """x [in, rows], float32 or float64 -> the bases [in, C, rows]."""
        return self._expand(x, self.bases, self.order)

    def slopes(self, x: Tensor) -> Tensor:
        """x [in, rows], float32 or float64 -> the derivatives of the bases [in, C, rows]."""
        lower = self._expand(x, self.bases + 1, self.order - 1)
        if self.knots is None:
            lower.mul_(self._per_interval)
        else:
            knots = self.knots.to(x.dtype)
            lower.mul_(self.order * _inverse(knots[:, self.order :] - knots[:, : -self.order])[:, :, None])
        return lower[:, :-1] - lower[:, 1:]

    @property
    def _per_interval(self) -> float:
        low, high = self.grid_range
        return (self.bases - self.order) / (high - low)

    def _expand(self, x: Tensor, count: int, order: int) -> Tensor:
        if self.knots is not None:
            return _recursion(x, self.knots.to(x.dtype), order)
        position = (x - self.grid_range[0]).mul_(self._per_interval)
        middles = torch.arange(count, dtype=x.dtype, device=x.device) + ((order + 1) / 2 - self.order)
        return _even(position[:, None] - middles[:, None], order)


def forward(x: Tensor, base_weight: Tensor, spline_weight: Tensor, grid: Grid) -> Tensor:
    """x [..., in], base_weight [out, in], spline_weight [out, in, C] -> [..., out]."""
    rows, weight = _as_rows(x), spline_weight.flatten(1)
    y = x.new_empty(len(rows), len(weight))
    for tile in _tiles(rows, grid.bases):
        phi = grid.expand(_columns(rows[tile])).flatten(0, 1).to(x.dtype)
        torch.mm(F.silu(rows[tile]), base_weight.T, out=y[tile])
        y[tile].addmm_(phi.T, weight.T)
    return y.view(*x.shape[:-1], len(weight))


def input_gradient(dy: Tensor, x: Tensor, base_weight: Tensor, spline_weight: Tensor, grid: Grid) -> Tensor:
    """dy [..., out], x [..., in] -> dx [..., in]."""
    dy, rows, weight = _as_rows(dy), _as_rows(x), spline_weight.flatten(1)
    dx = x.new_empty(rows.shape)
    for tile in _tiles(rows, grid.bases):
        slopes = grid.slopes(_columns(rows[tile]))
        through_spline = slopes.mul_((weight.T @ dy[tile].T).view(slopes.shape)).sum(1).T
        through_base = torch.ops.aten.silu_backward(dy[tile] @ base_weight, rows[tile])
        dx[tile] = through_base + through_spline
    return dx.view(x.shape)


def weight_gradients(dy: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """dy [..., out], x [..., in] -> gradients of the base weights [out, in] and the spline weights [out, in, C].

    Tiles are added up in float32 at least, first to last.
    """
    dy, rows = _as_rows(dy), _as_rows(x)
    out_features, in_features = dy.shape[1], rows.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    base = torch.zeros(out_features, in_features, dtype=exact, device=x.device)
    spline = torch.zeros(out_features, in_features * grid.bases, dtype=exact, device=x.device)
    for tile in _tiles(rows, grid.bases):
        phi = grid.expand(_columns(rows[tile])).flatten(0, 1).to(x.dtype)
        _add_product(base, dy[tile].T, F.silu(rows[tile]))
        _add_product(spline, dy[tile].T, phi.T)
    return base.to(x.dtype), spline.to(x.dtype).view(out_features, in_features, grid.bases)


def _as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n]."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _tiles(rows: Tensor, bases: int) -> Iterator[slice]:
    """The rows of each tile."""
    count, in_features = rows.shape
    step = max(FEWEST_ROWS, TILE * torch.get_num_threads() // max(1, in_features * bases))
    return (slice(start, start + step) for start in range(0, count, step))


def _columns(rows: Tensor) -> Tensor:
    """[rows, in] -> [in, rows], contiguous, in float32 at least."""
    return rows.T.contiguous().to(torch.promote_types(rows.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _even(e: Tensor, order: int) -> Tensor:
    """The basis at signed distances e from its middle, which are overwritten."""
    if order == 0:
        return ((e >= -0.5) & (e < 0.5)).to(e.dtype)
    outer = e.abs_().neg_().add_((order + 1) / 2).clamp_min_(0)
    inner = (outer - 1).clamp_min_(0)
    return outer.pow_(order).sub_(inner.pow_(order), alpha=order + 1).div_(math.factorial(order))


def _recursion(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Cox-de Boor as in the reference: x [in, rows], knots [in, n] -> [in, n - order - 1, rows].

    With ``s_g = (x - t_g) / (t_{g+k} - t_g)`` both factors are known: ``B_{g,k} = s_g B_{g,k-1} + (1 - s_{g+1})
    B_{g+1,k-1}``.
    """
    x, knots = x[:, None], knots[:, :, None]
    bases = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    distance = x.clamp(knots[:, :1], knots[:, -1:]) - knots  # far outside, 0 times a large distance might be NaN
    for k in range(1, order + 1):
        s = distance[:, :-k] * _inverse(knots[:, k:] - knots[:, :-k])
        upper = bases[:, 1:]
        bases = (s[:, :-1] * bases[:, :-1]).add_(upper).addcmul_(s[:, 1:], upper, value=-1)
    return bases


def _inverse(width: Tensor) -> Tensor:
    """1 / width; over an empty interval 0, and so is the basis there."""
    return torch.where(width > 0, 1 / width, 0)
