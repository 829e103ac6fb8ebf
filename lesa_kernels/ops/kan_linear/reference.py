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

    Zero outside of the knots, also at infinity. Repeated knots are allowed: a term over an empty interval is zero.
    Evaluated in float32 at least and rounded once to the dtype of x; in bf16 the second digit would be wrong.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _cox_de_boor(x.to(dtype), knots.to(dtype), order).to(x.dtype)


def _cox_de_boor(x: Tensor, knots: Tensor, order: int) -> Tensor:
    x = x.unsqueeze(-1)
    bases = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).to(x.dtype)
    outside = (x < knots[..., :1]) | (x > knots[..., -1:])
    x = torch.where(outside, knots[..., :1], x)  # the bases are 0 there, and 0 * inf would be NaN
    for k in range(1, order + 1):
        width = knots[..., k:] - knots[..., :-k]
        inverse = torch.where(width > 0, 1 / width, 0)
        rising = (x - knots[..., : -k - 1]) * inverse[..., :-1]
        falling = (knots[..., k + 1 :] - x) * inverse[..., 1:]
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def bspline_basis(x: Tensor, *, grid_size: int, order: int, grid_range: tuple[float, float]) -> Tensor:
    """Bases on uniform knots: x [...] -> [..., grid_size + order].

    In units of an interval, from the first knot, the knots are integers, so they are never rounded.
    """
    low, high = grid_range
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    position = (exact - low) * (grid_size / (high - low)) + order
    knots = torch.arange(grid_size + 2 * order + 1, dtype=position.dtype, device=x.device)
    return _cox_de_boor(position, knots, order).to(x.dtype)


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
