"""The arguments of the KAN layer: whether they fit together, and what autocast does to them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import autocast_device, check_whole


def check_grid(grid_size: int, order: int, grid_range: Sequence[float]) -> None:
    """Raise ValueError unless such a grid exists."""
    check_whole(order=order, grid_size=grid_size)
    if order < 0 or grid_size < 1:
        raise ValueError(f"a spline grid needs order >= 0 and grid_size >= 1, not order={order}, grid_size={grid_size}")
    try:
        low, high = map(float, grid_range)
    except (TypeError, ValueError):
        raise ValueError(f"grid_range must be two numbers, (low, high), not {grid_range!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"grid_range must run from a lower to a higher finite number, not {grid_range}")


def check_layer(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    order: int,
    grid_range: tuple[float, float],
    grid: Tensor | None,
) -> None:
    """Raise ValueError unless shapes and dtypes fit together."""
    check_whole(order=order)
    if base_weight.ndim != 2 or spline_weight.ndim != 3:
        raise ValueError(
            f"base_weight must be [out, in] and spline_weight [out, in, grid_size + order], "
            f"not {list(base_weight.shape)} and {list(spline_weight.shape)}"
        )
    out_features, in_features = base_weight.shape
    bases = spline_weight.shape[-1]
    check_grid(bases - order, order, grid_range)
    if spline_weight.shape[:2] != (out_features, in_features):
        raise ValueError(
            f"spline_weight {list(spline_weight.shape)} does not belong to base_weight {list(base_weight.shape)}: "
            f"expected [{out_features}, {in_features}, grid_size + order]"
        )
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is {list(x.shape)}, the weights take {in_features} features in its last dimension")
    if not x.dtype == base_weight.dtype == spline_weight.dtype:
        raise ValueError(
            f"x is {x.dtype}, base_weight {base_weight.dtype}, spline_weight {spline_weight.dtype}: use one dtype"
        )
    if grid is not None and grid.shape != (in_features, bases + order + 1):
        raise ValueError(
            f"grid {list(grid.shape)} does not carry {bases} bases of order {order} for {in_features} inputs: "
            f"expected [{in_features}, {bases + order + 1}]"
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the arguments of F.linear: one dtype for all, float64 left alone."""
    device = autocast_device(tensors[0])
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
