"""B-spline bases and the KAN layer in plain PyTorch: the specification, differentiable, in any float dtype.

With knots ``t_0 < t_1 < ...`` the bases follow the Cox-de Boor recursion (de Boor, "A Practical Guide to Splines"):

    B_{g,0}(x) = 1 if t_g <= x < t_{g+1} else 0
    B_{g,k}(x) = (x - t_g) / (t_{g+k} - t_g) B_{g,k-1}(x) + (t_{g+k+1} - x) / (t_{g+k+1} - t_{g+1}) B_{g+1,k-1}(x)

and a layer from ``in`` to ``out`` features with ``C`` bases an input is (the parameterisation of
https://github.com/Blealtan/efficient-kan)

    y_o = sum_i base_weight[o, i] silu(x_i) + sum_i sum_g spline_weight[o, i, g] B_g(x_i)
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform_knots(grid_size: int, order: int, grid_range: tuple[float, float]) -> Tensor:
    """``grid_size`` equal intervals over the range, ``order`` more on each side: float64 [grid_size + 2 order + 1]."""
    low, high = grid_range
    steps = torch.arange(-order, grid_size + order + 1, dtype=torch.float64)
    return low + steps * ((high - low) / grid_size)


def cox_de_boor(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """All bases of ``order`` on ``knots`` [..., n] (broadcast against x): x [...] -> [..., n - order - 1].

    Zero outside the knots, however far, also at infinity. Repeated knots are allowed: a term over an empty interval is
    zero. Evaluated in float32 at least and rounded once to the dtype of x: the recursion on bf16 numbers would be wrong
    in the second digit.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _cox_de_boor(x.to(dtype), knots.to(dtype), order).to(x.dtype)


def _cox_de_boor(x: Tensor, knots: Tensor, order: int) -> Tensor:
    x = x.unsqueeze(-1)
    bases = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).to(x.dtype)
    outside = (x < knots[..., :1]) | (x > knots[..., -1:])
    x = torch.where(outside, knots[..., :1], x)  # there the bases are 0, and 0 times a large x might overflow to NaN
    for k in range(1, order + 1):
        width = knots[..., k:] - knots[..., :-k]
        inverse = torch.where(width > 0, 1 / width, 0)
        rising = (x - knots[..., : -k - 1]) * inverse[..., :-1]
        falling = (knots[..., k + 1 :] - x) * inverse[..., 1:]
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def bspline_basis(x: Tensor, *, grid_size: int, order: int, grid_range: tuple[float, float]) -> Tensor:
    """Bases on uniform knots: x [...] -> [..., grid_size + order].

    Measured in intervals from the first knot the knots are the integers, so none of them is ever rounded.
    """
    position, knots, _ = _in_intervals(x, grid_size, order, grid_range)
    return _cox_de_boor(position, knots, order).to(x.dtype)


def bspline_slope(x: Tensor, *, grid_size: int, order: int, grid_range: tuple[float, float]) -> Tensor:
    """Derivatives of the bases: x [...] -> [..., grid_size + order].

    With the width h of an interval, ``B'_{g,k} = (B_{g,k-1} - B_{g+1,k-1}) / h``.
    """
    position, knots, per_interval = _in_intervals(x, grid_size, order, grid_range)
    if order == 0:
        return x.new_zeros(*x.shape, grid_size)
    lower = _cox_de_boor(position, knots, order - 1)
    return ((lower[..., :-1] - lower[..., 1:]) * per_interval).to(x.dtype)


def _in_intervals(
    x: Tensor, grid_size: int, order: int, grid_range: tuple[float, float]
) -> tuple[Tensor, Tensor, float]:
    """x in intervals from the first knot, the knots in the same unit, and intervals per unit of x."""
    low, high = grid_range
    per_interval = grid_size / (high - low)
    position = (x.to(torch.promote_types(x.dtype, torch.float32)) - low) * per_interval + order
    knots = torch.arange(grid_size + 2 * order + 1, dtype=position.dtype, device=x.device)
    return position, knots, per_interval


def kan_linear(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    *,
    order: int,
    grid_range: tuple[float, float],
    grid: Tensor | None = None,
) -> Tensor:
    """The layer above: x [..., in], base_weight [out, in], spline_weight [out, in, C] -> [..., out].

    ``grid`` [in, C + order + 1] gives each input its own knots; without it the knots are uniform over ``grid_range``.
    """
    if grid is None:
        bases = bspline_basis(x, grid_size=spline_weight.shape[-1] - order, order=order, grid_range=grid_range)
    else:
        bases = cox_de_boor(x, grid, order)
    return F.linear(F.silu(x), base_weight) + F.linear(bases.flatten(-2), spline_weight.flatten(1))


def input_gradient(
    dy: Tensor,
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    *,
    order: int,
    grid_range: tuple[float, float],
) -> Tensor:
    """Of ``kan_linear`` on uniform knots: ``dx_i = silu'(x_i) (dy W_base)_i + sum_g B'_g(x_i) (dy W_spline)_ig``."""
    slope = bspline_slope(x, grid_size=spline_weight.shape[-1] - order, order=order, grid_range=grid_range)
    through_spline = (dy @ spline_weight.flatten(1)).view(slope.shape)
    return torch.ops.aten.silu_backward(dy @ base_weight, x) + (through_spline * slope).sum(-1)


def weight_gradients(
    dy: Tensor, x: Tensor, *, bases: int, order: int, grid_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Of ``kan_linear`` on uniform knots: ``dy.T silu(x)`` [out, in] and ``dy.T B_g(x)`` [out, in, bases]."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    phi = bspline_basis(x, grid_size=bases - order, order=order, grid_range=grid_range)
    return dy.T @ F.silu(x), (dy.T @ phi.flatten(1)).unflatten(1, phi.shape[1:])
