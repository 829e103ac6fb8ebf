"""``kan_predict`` as callers and PyTorch see it: arguments checked, implementation chosen, gradients."""

from typing import Any

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import KERNEL_DTYPES, autocast_device, check_tensors, needs_gradient
from ...library import define
from ..kan_linear.arguments import check_grid
from . import pieces, reference

KERNEL_ORDERS = (1, 2, 3)
OPEN_STEPS = 16  # the kernel keeps min(K, P) sums: 16 take all 255 registers, more would spill


def kan_predict(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    backend: str = "auto",
) -> Tensor:
    """The next P features from a window of K, by linear weights and a KAN on the features themselves.

    Args:
        history: [K, *feature], oldest first, float32, bfloat16, float16 or float64; the last dimension holds the
            channels D.
        gates: [P, E], how much of every expert each predicted step gets.
        linear_weight: [E, K].
        base_weight: [E, K], weights of SiLU.
        spline_weight: [E, K, grid_size + order], weights of the bases.
        bias: [E].
        scale: [D], multiplies the features before the KAN, into its grid; the result is divided by it. None: ones.
        order: degree of the splines.
        grid_range: the uniform grid.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``, the reference. The kernel serves float32,
            float16 and bfloat16, orders 1 to 3 and min(K, P) <= 16; else the reference runs on pieces of the tokens.

    Returns:
        [P, *feature] in the dtype of history; each prediction enters the window of the next, unrounded. Sums are in
        float32 (float64 for a float64 history), under autocast too, rounded once. The weights may have any dtype.

    Gradients are those of the reference, which runs again in the backward pass; only the arguments are kept. They
    can be differentiated again.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    _check(history, gates, linear_weight, base_weight, spline_weight, bias, scale)
    check_grid(spline_weight.shape[-1] - order, order, grid_range)
    choose_backend(backend, history)  # raises if it is not available, also in a traced call
    tensors = (history, gates, linear_weight, base_weight, spline_weight, bias, scale)
    low, high = map(float, grid_range)
    if backend == "torch" or history.device.type not in ("cpu", "cuda"):
        return reference.kan_predict(*tensors, order=order, grid_range=(low, high))
    if needs_gradient(*tensors):
        result: Tensor = _KanPredict.apply(*tensors, order, low, high, backend)  # type: ignore[no-untyped-call]
        return result
    return _kan_predict(*tensors, order, low, high, backend)


class _KanPredict(torch.autograd.Function):
    """The registered operation with the gradients of the reference, which runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.order, ctx.low, ctx.high, _ = arguments
        ctx.save_for_backward(*tensors)
        return _kan_predict(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:7]
        with torch.autocast(autocast_device(grads[0]), enabled=False):
            gradients = pieces.gradients(grads[0], ctx.saved_tensors, wanted, ctx.order, (ctx.low, ctx.high))
        return *gradients, None, None, None, None


def _run(history: Tensor, gates: Tensor, *rest: Any) -> Tensor:
    *weights, order, low, high, backend = rest
    if not (choose_backend(backend, history) == "triton" and kernel_serves(history, len(gates), order)):
        return pieces.kan_predict(history, gates, *weights, order=order, grid_range=(low, high))
    from . import launch

    return launch.kan_predict(history, gates, *weights, order=order, grid_range=(low, high))


_kan_predict = define(
    "kan_predict(Tensor history, Tensor gates, Tensor linear_weight, Tensor base_weight, Tensor spline_weight,"
    " Tensor bias, Tensor? scale, int order, float low, float high, str backend) -> Tensor",
    _run,
    lambda history, gates, *_: history.new_empty(gates.shape[0], *history.shape[1:]),
)


def kernel_serves(history: Tensor, steps: int, order: int) -> bool:
    """Whether the Triton kernel has tiles for these features, steps and splines."""
    return (
        history.dtype in KERNEL_DTYPES
        and order in KERNEL_ORDERS
        and min(len(history), steps) <= OPEN_STEPS
        and steps > 0
        and history.numel() > 0
    )


def _check(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
) -> None:
    check_tensors(
        {
            "history": history,
            "gates": gates,
            "linear_weight": linear_weight,
            "base_weight": base_weight,
            "spline_weight": spline_weight,
            "bias": bias,
        },
        {"scale": scale},
    )
    if history.ndim < 2 or len(history) == 0:
        raise ValueError(
            f"history must be [K, *feature] with K >= 1 and at least one dimension of channels, "
            f"not {list(history.shape)}"
        )
    window, experts, channels = history.shape[0], bias.numel(), history.shape[-1]
    expected = {
        "gates": (gates, ("P", experts)),
        "linear_weight": (linear_weight, (experts, window)),
        "base_weight": (base_weight, (experts, window)),
        "spline_weight": (spline_weight, (experts, window, "grid_size + order")),
        "bias": (bias, (experts,)),
        "scale": (scale, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        fits = tensor.ndim == len(shape) and all(
            isinstance(size, str) or size == n for n, size in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected [{', '.join(map(str, shape))}] for {window} features of "
                f"{channels} channels and {experts} experts"
            )
