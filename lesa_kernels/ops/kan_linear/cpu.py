"""The KAN layer and its gradients on a CPU: one tile of rows at a time, whose bases stay in the cache.

The reference makes some thirty passes over tensors [rows, in, C] in memory. Here the bases of a tile are [in, C, rows]:
elementwise operations run along neighbouring rows, and flattened to [in * C, rows] the tile is multiplied by
``spline_weight`` [out, in * C] as it is in memory. For 4,096 rows, 256
inputs and outputs and 8 bases in float32 one core of a Xeon takes 51 ms instead of 484, 28 of them the product itself.

On uniform knots the bases of order k are shifts of one even function. In intervals from its middle, with
``s = max((k + 1) / 2 - |e|, 0)``, it is ``(s^k - (k + 1) max(s - 1, 0)^k) / k!`` for k = 1, 2, 3 (the truncated powers
of kernels.py). Derivatives are differences of the bases one order below, ``B'_{g,k} = k B_{g,k-1} / (t_{g+k} - t_g) -
k B_{g+1,k-1} / (t_{g+k+1} - t_{g+1})``, on any knots.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ORDERS = (1, 2, 3)
# Elements of a tile for each thread: 1 MiB in float32. From a quarter to twice of this, times differ by less than 10 %.
# The rows of a tile are a multiple of ROWS, for the matrix product.
TILE = 1 << 18
ROWS = 32
DENSE = 16  # bases up to which all are evaluated


@dataclass(frozen=True)
class Grid:
    """The knots of a layer: uniform and the same for all inputs, or explicit ``knots`` [in, C + order + 1]."""

    bases: int
    order: int
    grid_range: tuple[float, float]
    knots: Tensor | None = None

    def expand(self, x: Tensor, space: Tensor) -> Tensor:
        """x [in, rows], float32 or float64 -> the bases [in, C, rows], in the work space of ``_space``."""
        return self._expand(x, space, self.bases, self.order)

    def contract_slopes(self, x: Tensor, factors: Tensor, space: Tensor) -> Tensor:
        """x [in, rows], factors [in, C, rows] -> the sum of derivatives of bases times factors, [in, rows]."""
        lower = self._expand(x, space, self.bases + 1, self.order - 1)
        per_interval = self._per_interval
        if self.knots is not None:
            knots = self.knots.to(x.dtype)
            lower.mul_(self.order * _inverse(knots[:, self.order :] - knots[:, : -self.order])[:, :, None])
            per_interval = 1.0
        slopes = torch.sub(lower[:, :-1], lower[:, 1:], out=_shaped(space[1], factors.shape))
        return slopes.mul_(factors).sum(1).mul_(per_interval)

    @property
    def _per_interval(self) -> float:
        low, high = self.grid_range
        return (self.bases - self.order) / (high - low)

    def _expand(self, x: Tensor, space: Tensor, count: int, order: int) -> Tensor:
        if self.knots is not None:
            return _recursion(x, self.knots.to(x.dtype), order)
        # in intervals, with the middle of basis g at g + (1 - order) / 2
        position = (x - self.grid_range[0]).mul_(self._per_interval).add_(self.order - order)
        shape = len(x), count, x.shape[1]
        if count <= DENSE:
            middles = (torch.arange(count, device=x.device) + (1 - order) / 2).to(x.dtype)
            distance, inner = (_shaped(part, shape) for part in space)
            return _even(torch.sub(position[:, None], middles[:, None], out=distance), inner, order)
        # only the order + 1 bases around x are evaluated; outside of the grid these are zero too
        start = position.floor().clamp_(0, count - order - 1).nan_to_num_(0)
        local = torch.arange(order + 1, device=x.device)[:, None]
        distance = (position - start)[:, None] - (local + (1 - order) / 2).to(x.dtype)
        values = _even(distance, torch.empty_like(distance), order)
        return _shaped(space[0], shape).zero_().scatter_(1, start.long()[:, None] + local, values)


def forward(x: Tensor, base_weight: Tensor, spline_weight: Tensor, grid: Grid) -> Tensor:
    """x [..., in], base_weight [out, in], spline_weight [out, in, C] -> [..., out]."""
    rows, weight = _as_rows(x), spline_weight.flatten(1)
    y = x.new_empty(len(rows), len(weight))
    space = _space(rows, grid)
    for tile in _tiles(rows, grid):
        columns = rows[tile].T.contiguous()
        phi = grid.expand(_exactly(columns), space).flatten(0, 1).to(x.dtype)
        y[tile] = (weight @ phi).addmm_(base_weight, F.silu(columns)).T
    return y.view(*x.shape[:-1], len(weight))


def input_gradient(dy: Tensor, x: Tensor, base_weight: Tensor, spline_weight: Tensor, grid: Grid) -> Tensor:
    """dy [..., out], x [..., in] -> dx [..., in]."""
    dy, rows, weight = _as_rows(dy), _as_rows(x), spline_weight.flatten(1)
    dx = x.new_empty(rows.shape)
    space = _space(rows, grid)
    products = space.new_empty(space.shape[1], dtype=x.dtype)
    for tile in _tiles(rows, grid):
        columns, change = (t[tile].T.contiguous() for t in (rows, dy))
        along = torch.mm(weight.T, change, out=_shaped(products, (weight.shape[1], change.shape[1])))
        along = along.unflatten(0, (len(columns), grid.bases))
        through_spline = grid.contract_slopes(_exactly(columns), along, space)
        dx[tile] = through_spline.add_(torch.ops.aten.silu_backward(base_weight.T @ change, columns)).T
    return dx.view(x.shape)


def weight_gradients(dy: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """dy [..., out], x [..., in] -> gradients of the base weights [out, in] and the spline weights [out, in, C].

    Tiles are added in float32 at least, in a fixed order.
    """
    dy, rows = _as_rows(dy), _as_rows(x)
    out_features, in_features = dy.shape[1], rows.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    base = torch.zeros(out_features, in_features, dtype=exact, device=x.device)
    spline = torch.zeros(out_features, in_features * grid.bases, dtype=exact, device=x.device)
    space = _space(rows, grid)
    for tile in _tiles(rows, grid):
        phi = grid.expand(_exactly(rows[tile].T.contiguous()), space).flatten(0, 1).to(x.dtype)
        _add_product(base, dy[tile].T, F.silu(rows[tile]))
        _add_product(spline, dy[tile].T, phi.T)
    return base.to(x.dtype), spline.to(x.dtype).view(out_features, in_features, grid.bases)


def _as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n]."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _tile_rows(rows: Tensor, grid: Grid) -> int:
    fitting = TILE * torch.get_num_threads() // max(1, rows.shape[1] * grid.bases)
    return min(len(rows), max(1, fitting // ROWS) * ROWS)


def _tiles(rows: Tensor, grid: Grid) -> Iterator[slice]:
    """The rows of each tile."""
    step = max(1, _tile_rows(rows, grid))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _space(rows: Tensor, grid: Grid) -> Tensor:
    """Work space of all tiles, [2, in * (C + 1) * rows]; allocating it for each tile would cost 2 to 3 passes."""
    size = rows.shape[1] * (grid.bases + 1) * _tile_rows(rows, grid)
    return rows.new_empty(2, size, dtype=torch.promote_types(rows.dtype, torch.float32))


def _shaped(space: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of ``space`` in this shape."""
    return space[: math.prod(shape)].view(shape)


def _exactly(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _even(e: Tensor, inner: Tensor, order: int) -> Tensor:
    """The basis at signed distances e from its middle; overwrites ``e`` and ``inner``, which has its shape."""
    if order == 0:
        return e.copy_((e >= -0.5) & (e < 0.5))
    outer = e.abs_().sub_((order + 1) / 2).clamp_max_(0)  # -s, which saves a pass
    torch.add(outer, 1, out=inner).clamp_max_(0)
    return outer.pow_(order).sub_(inner.pow_(order), alpha=order + 1).mul_((-1) ** order / math.factorial(order))


def _recursion(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Cox-de Boor as in the reference: x [in, rows], knots [in, n] -> [in, n - order - 1, rows].

    With ``s_g = (x - t_g) / (t_{g+k} - t_g)`` both factors are known: ``B_{g,k} = s_g B_{g,k-1} + (1 - s_{g+1})
    B_{g+1,k-1}``.
    """
    x, knots = x[:, None], knots[:, :, None]
    bases = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    distance = x.clamp(knots[:, :1], knots[:, -1:]) - knots  # 0 times infinity would be NaN
    for k in range(1, order + 1):
        s = distance[:, :-k] * _inverse(knots[:, k:] - knots[:, :-k])
        upper = bases[:, 1:]
        bases = (s[:, :-1] * bases[:, :-1]).add_(upper).addcmul_(s[:, 1:], upper, value=-1)
    return bases


def _inverse(width: Tensor) -> Tensor:
    """1 / width; 0 for an empty interval."""
    return torch.where(width > 0, 1 / width, 0)
