"""The KAN functions as callers see them: arguments checked, implementation chosen.

Kernels exist for the uniform grid on a GPU (or in Triton's interpreter), and for any knots on a CPU. Everything else
runs on the reference, which autograd differentiates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
            uniform grid, orders 1 to 3 and float32, float16 and bfloat16; ``"native"`` supports orders 1 to 3 on any
            knots. Everything else runs on the reference.

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
    """:func:`kan_linear`; with ``look``, knots are compared and uniform ones use the faster code.

    They are compared when the operation runs, so that compiled code does not depend on earlier knots.
    """
    check_tensors({"x": x, "base_weight": base_weight, "spline_weight": spline_weight}, {"grid": grid})
    x, base_weight, spline_weight = autocast(x, base_weight, spline_weight)
    check_layer(x, base_weight, spline_weight, order, grid_range, grid)
    chosen = choose_backend(backend, x)
    tensors, low, high = (x, base_weight, spline_weight), *map(float, grid_range)
    layer = _Layer(order, low, high, grid, chosen == "triton", look)
    if layer.triton:
        served = (grid is None or look) and order in KERNEL_ORDERS and x.dtype in KERNEL_DTYPES
    else:
        served = chosen == "native" and order in cpu.ORDERS
    if needs_gradient(grid):
        served = False  # only the reference has gradients of the knots
    if not served or torch._C._are_functorch_transforms_active():
        return reference.kan_linear(*tensors, order=order, grid_range=layer.range, grid=layer.snapped())
    if needs_gradient(*tensors):
        y: Tensor = _KanLinear.apply(*tensors, *layer)  # type: ignore[no-untyped-call]
        return y
    return _forward(*tensors, *layer)


class _Layer(NamedTuple):
    """The options of the operations; ``look``: see :func:`run_layer`."""

    order: int
    low: float
    high: float
    grid: Tensor | None = None
    triton: bool = False
    look: bool = False

    @property
    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def knots(self) -> Tensor | None:
        """The explicit knots; None for uniform ones."""
        uniform = self.grid is None or (self.look and runs_uniform(self.grid, self.order, self.range))
        return None if uniform else self.grid

    def snapped(self) -> Tensor | None:
        """The explicit knots for the reference; rounded uniform ones are exact."""
        return snapped(self.grid, self.order, self.range) if self.grid is not None and self.look else self.grid


def _run_forward(x: Tensor, base_weight: Tensor, spline_weight: Tensor, *options: Any) -> Tensor:
    layer = _Layer(*options)
    knots, weights = layer.knots(), (base_weight, spline_weight)
    if not layer.triton:
        return cpu.forward(x, *weights, cpu.Grid(spline_weight.shape[-1], layer.order, layer.range, knots))
    if knots is not None:
        return reference.kan_linear(x, *weights, order=layer.order, grid_range=layer.range, grid=knots)
    from . import launch

    return launch.forward(x, *weights, layer.order, layer.range)


def _run_input_gradient(dy: Tensor, x: Tensor, base_weight: Tensor, spline_weight: Tensor, *options: Any) -> Tensor:
    layer = _Layer(*options)
    knots, weights = layer.knots(), (base_weight, spline_weight)
    if not layer.triton or knots is not None:
        return cpu.input_gradient(dy, x, *weights, cpu.Grid(spline_weight.shape[-1], layer.order, layer.range, knots))
    from . import launch

    return launch.input_gradient(dy, x, *weights, layer.order, layer.range)


def _run_weight_gradients(dy: Tensor, x: Tensor, bases: int, *options: Any) -> tuple[Tensor, Tensor]:
    layer = _Layer(*options)
    knots = layer.knots()
    if not layer.triton or knots is not None:
        return cpu.weight_gradients(dy, x, cpu.Grid(bases, layer.order, layer.range, knots))
    from . import launch

    return launch.weight_gradients(dy, x, bases, layer.order, layer.range)


def _fake_weight_gradients(dy: Tensor, x: Tensor, bases: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = dy.shape[-1], x.shape[-1]
    return x.new_empty(shape), x.new_empty(*shape, bases)


_LAYER = "int order, float low, float high, Tensor? grid=None, bool triton=False, bool look=False"
_forward = define(
    f"kan_linear(Tensor x, Tensor base_weight, Tensor spline_weight, {_LAYER}) -> Tensor",
    _run_forward,
    lambda x, base_weight, *_: x.new_empty(*x.shape[:-1], base_weight.shape[0]),
)
_input_gradient = define(
    f"kan_linear_input_gradient(Tensor dy, Tensor x, Tensor base_weight, Tensor spline_weight, {_LAYER}) -> Tensor",
    _run_input_gradient,
    lambda dy, x, *_: x.new_empty(x.shape),
)
_weight_gradients = define(
    f"kan_linear_weight_gradients(Tensor dy, Tensor x, int bases, {_LAYER}) -> (Tensor, Tensor)",
    _run_weight_gradients,
    _fake_weight_gradients,
)


class _KanLinear(torch.autograd.Function):
    """The operations with their gradients; only x, the weights and explicit knots are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base_weight: Tensor, spline_weight: Tensor, *options: Any) -> Tensor:
        ctx.layer = _Layer(*options)
        ctx.save_for_backward(x, base_weight, spline_weight, ctx.layer.grid)
        ctx.layer = ctx.layer._replace(grid=None)
        return _forward(x, base_weight, spline_weight, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, grid = ctx.saved_tensors
        x, _, spline_weight = tensors
        layer = ctx.layer._replace(grid=grid)
        for_x, for_base, for_spline = needed = ctx.needs_input_grad[:3]
        rest = (None,) * len(layer)
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dy, tensors, needed, layer), *rest
        dx = _input_gradient(dy, *tensors, *layer) if for_x else None
        d_base = d_spline = None
        if for_base or for_spline:
            d_base, d_spline = _weight_gradients(dy, x, spline_weight.shape[-1], *layer)
        return dx, d_base if for_base else None, d_spline if for_spline else None, *rest


def _differentiable_gradients(
    dy: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], layer: _Layer
) -> list[Tensor | None]:
    """The gradients of the reference, which can be differentiated again."""
    # views, since one argument may have been computed from another, and gradients must stop here
    views = [t.view_as(t) for t in tensors]
    y = reference.kan_linear(*views, order=layer.order, grid_range=layer.range, grid=layer.snapped())
    wanted = [t for t, need in zip(views, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if need else None for need in needed]
