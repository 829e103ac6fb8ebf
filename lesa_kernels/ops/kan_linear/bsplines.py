"""The splines of a layer as ``scipy.interpolate.BSpline`` and back. scipy is imported only when one is made.

A layer's bases fade to zero over its outer knots; a ``BSpline`` continues its first and last polynomials instead. With
``order + 1`` further coefficients of zero at each end these polynomials are zero, and both are one function everywhere.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.interpolate import BSpline


def to_bsplines(knots: Tensor, coefficients: Tensor, order: int) -> "list[BSpline]":
    """knots [in, C + order + 1], coefficients [out, in, C] -> for each input a spline from x [...] to [..., out]."""
    try:
        from scipy.interpolate import BSpline
    except ImportError as error:
        raise ImportError("to_bsplines needs the package scipy: pip install scipy") from error
    more = order + 1
    splines = []
    for t, c in zip(knots.detach().double().cpu(), coefficients.detach().double().cpu().unbind(1), strict=True):
        beyond = torch.arange(1, more + 1, dtype=t.dtype) * (t[-1] - t[0]).clamp(min=1e-3) / len(t)
        t = torch.cat([t[0] - beyond.flip(0), t, t[-1] + beyond])
        c = torch.nn.functional.pad(c, (more, more)).T.contiguous()  # [C + 2 order + 2, out]
        splines.append(BSpline(t.numpy(), c.numpy(), order))
    return splines


def from_bsplines(splines: "Sequence[BSpline]") -> tuple[Tensor, Tensor, int]:
    """Splines, one for each input -> knots [in, C + order + 1] and coefficients [out, in, C], float64, and the order.

    Zeros that ``to_bsplines`` added are taken away again.

    Raises:
        ValueError: if the splines differ in their order, number of coefficients or outputs, or are no real functions
            of one value or one vector.
    """
    orders = {spline.k for spline in splines}
    tables = [torch.as_tensor(spline.c[: len(spline.t) - spline.k - 1].copy()) for spline in splines]
    shapes = {tuple(c.shape) for c in tables}
    if len(orders) != 1 or len(shapes) != 1:
        raise ValueError(
            "a layer needs splines of one order and one number of coefficients, one spline for each input, not "
            f"{len(tables)} splines of the orders {sorted(orders)} with coefficients {sorted(shapes)}"
        )
    if tables[0].ndim > 2 or tables[0].is_complex():
        raise ValueError(f"coefficients must be real [C] or [C, out], not {tables[0].dtype} {list(tables[0].shape)}")
    (order,) = orders
    coefficients = torch.stack([c.double().reshape(len(c), -1).T for c in tables], 1)  # [out, in, C]
    knots = torch.stack([torch.as_tensor(spline.t.copy()).double() for spline in splines])
    # A basis with a zero coefficient may go, with the outer knot that only it needs.
    used = (coefficients != 0).flatten(0, 1).any(0).nonzero().flatten().tolist() or [0]
    spare = coefficients.shape[-1] - order - 1
    first = min(used[0], order + 1, spare)
    last = min(coefficients.shape[-1] - 1 - used[-1], order + 1, spare - first)
    return knots[:, first : knots.shape[1] - last], coefficients[..., first : coefficients.shape[-1] - last], order
