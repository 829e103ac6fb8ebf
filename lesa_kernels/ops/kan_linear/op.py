"""The KAN functions as callers see them: arguments checked, implementation chosen.

The registered operations serve what their kernels serve: a GPU (or Triton's interpreter) the uniform grid, a CPU any
knots. Everything else is the reference, which autograd differentiates.
"""

from typing import Any

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import KERNEL_DTYPES, check_tensors, needs_gradient
from ...library import define
from . import cpu, reference
from .arguments import autocast, check_grid, check_layer
from .uniform import runs_uniform, snapped

KERNEL_ORDERS = (1, 2, 3)


def bspline_basis(
    x: Tensor, *, grid_size: int = 5, order: int = 3, grid_range: tuple[float, float] = (-3.0, 3.0)
) -> Tensor:
    """B-spline bases on uniform knots, zero outside the extended grid.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        grid_size: intervals over ``grid_range``.
        order: degree of the pieces, 3 for cubic.
        grid_range: the bases add up to one between these bounds and fade to zero over ``order`` intervals beyond.

    Returns:
        [..., grid_size + order] in the dtype of ``x``; differentiable, twice as well.

    Raises:
        ValueError: for an x that is no float tensor, or a grid that does not exist.

    Source: de Boor, "A Practical Guide to Splines", chapter IX.
    """
    check_tensors({"x": x})
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
        x: [..., in], float32, bfloat16, float16 or float64.
        base_weight: [out, in].
        spline_weight: [out, in, grid_size + order], with any scaler already multiplied in.
        order: degree of the splines.
        grid_range: the uniform grid, the same for all inputs.
        grid: [in, knots], explicit knots that need not be uniform; overrides ``grid_range``.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``, the reference. Triton kernels exist for the
            uniform grid, orders 1 to 3 and float32, float16 and bfloat16; ``"native"`` serves orders 1 to 3 on any
            knots, in tiles; everything else is the reference whatever the backend.

    Returns:
        [..., out]. Outside the extended grid the spline part is exactly zero and the SiLU part remains.

    Kernels and tiles keep nothing but x and the weights for the backward pass, sum in float32 without TF32, and give
    the same bits in every run. Under autocast the three tensors are cast together, as in F.linear. A derivative of a
    gradient (``create_graph=True``) and the transforms of torch.func go through the reference.

    Raises:
        ValueError: if shapes or dtypes do not fit together.

    Source: Liu et al., "KAN", https://arxiv.org/abs/2404.19756, in the parameterisation of efficient-kan.
    """
    return run_layer(
        x, base_weight, spline_weight, order=order, grid_range=grid_range, grid=grid, look=False, backend=backend
    )


def run_layer(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    *,
    order: int,
    grid_range: tuple[float, float],
    grid: Tensor | None,
    look: bool,
    backend: str,
) -> Tensor:
    """:func:`kan_linear`; with ``look``, knots that turn out to be those of ``grid_range`` are served as these.

    That is decided when the operation runs, from the knots it is given then, so that compiled code is not bound to what
    they were.
    """
    check_tensors({"x": x, "base_weight": base_weight, "spline_weight": spline_weight}, {"grid": grid})
    x, base_weight, spline_weight = autocast(x, base_weight, spline_weight)
    check_layer(x, base_weight, spline_weight, order, grid_range, grid)
    low, high = map(float, grid_range)
    chosen = choose_backend(backend, x)
    triton = chosen == "triton"
    if triton:
        served = (grid is None or look) and order in KERNEL_ORDERS and x.dtype in KERNEL_DTYPES
    else:
        served = chosen == "native" and order in cpu.ORDERS
    if needs_gradient(grid):
        served = False  # a gradient of the knots is the reference's
    if not served or torch._C._are_functorch_transforms_active():
        grid = snapped(grid, order, (low, high)) if grid is not None and look else grid
        return reference.kan_linear(x, base_weight, spline_weight, order=order, grid_range=grid_range, grid=grid)
    tensors = (x, base_weight, spline_weight)
    if needs_gradient(*tensors):
        y: Tensor = _KanLinear.apply(*tensors, order, low, high, grid, triton, look)  # type: ignore[no-untyped-call]
        return y
    return _forward(*tensors, order, low, high, grid, triton, look)


def _forward_op(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    order: int,
    low: float,
    high: float,
    grid: Tensor | None = None,
    triton: bool = False,
    look: bool = False,
) -> Tensor:
    knots = _explicit(grid, order, low, high, look)
    if not triton:
        return cpu.forward(x, base_weight, spline_weight, cpu.Grid(spline_weight.shape[-1], order, (low, high), knots))
    if knots is not None:
        return reference.kan_linear(x, base_weight, spline_weight, order=order, grid_range=(low, high), grid=knots)
    from . import launch

    return launch.forward(x, base_weight, spline_weight, order, (low, high))


def _input_gradient_op(
    dy: Tensor,
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    order: int,
    low: float,
    high: float,
    grid: Tensor | None = None,
    triton: bool = False,
    look: bool = False,
) -> Tensor:
    knots = _explicit(grid, order, low, high, look)
    if not triton or knots is not None:
        where = cpu.Grid(spline_weight.shape[-1], order, (low, high), knots)
        return cpu.input_gradient(dy, x, base_weight, spline_weight, where)
    from . import launch

    return launch.input_gradient(dy, x, base_weight, spline_weight, order, (low, high))


def _weight_gradients_op(
    dy: Tensor,
    x: Tensor,
    bases: int,
    order: int,
    low: float,
    high: float,
    grid: Tensor | None = None,
    triton: bool = False,
    look: bool = False,
) -> tuple[Tensor, Tensor]:
    knots = _explicit(grid, order, low, high, look)
    if not triton or knots is not None:
        return cpu.weight_gradients(dy, x, cpu.Grid(bases, order, (low, high), knots))
    from . import launch

    return launch.weight_gradients(dy, x, bases, order, (low, high))


def _explicit(grid: Tensor | None, order: int, low: float, high: float, look: bool) -> Tensor | None:
    """The knots that are needed; None where they are those of the range, as far as it is asked."""
    return None if grid is None or (look and runs_uniform(grid, order, (low, high))) else grid


def _fake_weight_gradients(dy: Tensor, x: Tensor, bases: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = dy.shape[-1], x.shape[-1]
    return x.new_empty(shape), x.new_empty(*shape, bases)


_GRID = "int order, float low, float high, Tensor? grid=None, bool triton=False, bool look=False"
_forward = define(
    f"kan_linear(Tensor x, Tensor base_weight, Tensor spline_weight, {_GRID}) -> Tensor",
    _forward_op,
    lambda x, base_weight, *_: x.new_empty(*x.shape[:-1], base_weight.shape[0]),
)
_input_gradient = define(
    f"kan_linear_input_gradient(Tensor dy, Tensor x, Tensor base_weight, Tensor spline_weight, {_GRID}) -> Tensor",
    _input_gradient_op,
    lambda dy, x, *_: x.new_empty(x.shape),
)
_weight_gradients = define(
    f"kan_linear_weight_gradients(Tensor dy, Tensor x, int bases, {_GRID}) -> (Tensor, Tensor)",
    _weight_gradients_op,
    _fake_weight_gradients,
)


class _KanLinear(torch.autograd.Function):
    """The operations with their gradients; x, the weights and any knots are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_weight: Tensor,
        spline_weight: Tensor,
        order: int,
        low: float,
        high: float,
        grid: Tensor | None,
        triton: bool,
        look: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, base_weight, spline_weight, grid)
        ctx.options = order, low, high, triton, look
        return _forward(x, base_weight, spline_weight, order, low, high, grid, triton, look)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, base_weight, spline_weight, grid = ctx.saved_tensors
        order, low, high, triton, look = ctx.options
        for_x, for_base, for_spline = ctx.needs_input_grad[:3]
        rest = (None,) * 6
        if torch.is_grad_enabled():
            tensors = x, base_weight, spline_weight
            grid = snapped(grid, order, (low, high)) if grid is not None and look else grid
            return *_differentiable_gradients(dy, tensors, ctx.needs_input_grad, order, (low, high), grid), *rest
        dx = d_base = d_spline = None
        if for_x:
            dx = _input_gradient(dy, x, base_weight, spline_weight, order, low, high, grid, triton, look)
        if for_base or for_spline:
            bases = spline_weight.shape[-1]
            d_base, d_spline = _weight_gradients(dy, x, bases, order, low, high, grid, triton, look)
        return dx, d_base if for_base else None, d_spline if for_spline else None, *rest


def _differentiable_gradients(
    dy: Tensor,
    tensors: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    order: int,
    grid_range: tuple[float, float],
    grid: Tensor | None,
) -> list[Tensor | None]:
    """The gradients by way of the reference, for a caller who differentiates them again."""
    # Views, since one argument may have been computed from another: their gradients have to stop here.
    views = [t.view_as(t) for t in tensors]
    y = reference.kan_linear(*views, order=order, grid_range=grid_range, grid=grid)
    wanted = [t for t, need in zip(views, needed, strict=False) if need]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if need else None for need in needed[:3]]
