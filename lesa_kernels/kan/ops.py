"""The KAN functions as callers see them: arguments checked, implementation chosen."""

from torch import Tensor

from ..backend import use_triton
from . import reference


def bspline_basis(
    x: Tensor, *, grid_size: int = 5, order: int = 3, grid_range: tuple[float, float] = (-3.0, 3.0)
) -> Tensor:
    """B-spline bases on uniform knots, zero outside the extended grid.

    Args:
        x: any shape and float dtype.
        grid_size: intervals over ``grid_range``.
        order: degree of the pieces, 3 for cubic.
        grid_range: the bases add up to one between these bounds and fade to zero over ``order`` intervals beyond.

    Returns:
        [..., grid_size + order] in the dtype of ``x``; differentiable, twice as well.

    Source: de Boor, "A Practical Guide to Splines", chapter IX.
    """
    check_grid(grid_size, order, grid_range)
    return reference.bspline_basis(x, grid_size=grid_size, order=order, grid_range=grid_range)


def kan_linear(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    *,
    order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    grid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A KAN layer: ``silu(x) @ base_weight.T`` plus a learned B-spline on every edge.

    Args:
        x: [..., in], any float dtype.
        base_weight: [out, in].
        spline_weight: [out, in, grid_size + order], with any scaler already multiplied in.
        order: degree of the splines.
        grid_range: the uniform grid, the same for all inputs.
        grid: [in, knots], explicit knots that need not be uniform; overrides ``grid_range``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [..., out]. Outside the extended grid the spline part is exactly zero and the SiLU part remains.

    Raises:
        ValueError: if shapes or dtypes do not fit together.

    Source: Liu et al., "KAN", https://arxiv.org/abs/2404.19756, in the parameterisation of efficient-kan.
    """
    out_features, in_features = base_weight.shape
    bases = spline_weight.shape[-1]
    check_grid(bases - order, order, grid_range)
    if spline_weight.shape[:2] != (out_features, in_features):
        raise ValueError(
            f"spline_weight {list(spline_weight.shape)} does not belong to base_weight {list(base_weight.shape)}: "
            f"expected [{out_features}, {in_features}, grid_size + order]"
        )
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features in its last dimension, the weights take {in_features}")
    if not x.dtype == base_weight.dtype == spline_weight.dtype:
        raise ValueError(
            f"x is {x.dtype}, base_weight {base_weight.dtype}, spline_weight {spline_weight.dtype}: use one dtype"
        )
    if grid is not None and grid.shape != (in_features, bases + order + 1):
        raise ValueError(
            f"grid {list(grid.shape)} does not carry {bases} bases of order {order} for {in_features} inputs: "
            f"expected [{in_features}, {bases + order + 1}]"
        )
    use_triton(backend, x)
    return reference.kan_linear(x, base_weight, spline_weight, order=order, grid_range=grid_range, grid=grid)


def check_grid(grid_size: int, order: int, grid_range: tuple[float, float]) -> None:
    """Raise ValueError unless such a grid exists."""
    if order < 0 or grid_size < 1:
        raise ValueError(f"a spline grid needs order >= 0 and grid_size >= 1, not order={order}, grid_size={grid_size}")
    low, high = grid_range
    if not low < high:
        raise ValueError(f"grid_range must run from a lower to a higher number, not {grid_range}")
