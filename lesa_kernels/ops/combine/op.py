"""``combine`` as callers and PyTorch see it: arguments checked, implementation chosen, gradients.

Kernels exist for coefficients that are shared, per channel or per sample on a GPU (or in Triton's interpreter), and
shared or per channel on a CPU. Everything else runs on the reference, which autograd differentiates.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import KERNEL_DTYPES, check_tensors, has_contiguous_rows, needs_gradient
from ...library import define
from ...overlap import overlap
from . import cpu, reference
from .segments import MAX_FEATURES, segmentation


def combine(
    history: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Several predictions from the same kept features: ``out[p] = sum_j coefficients[p, j] history[j] + bias[p]``.

    Args:
        history: [m, *feature], m >= 1, float32, bfloat16, float16 or float64.
        coefficients: [P, m, *c], float32 (float64 for a float64 history). ``c`` is empty, or broadcasts to a feature:
            [1, 1, D] gives every channel its own numbers, [B, 1, 1] every sample.
        bias: [P, *c], in the dtype of the coefficients.
        out: [P, *feature] in the dtype of history, is overwritten; not with gradients, and no memory of another
            argument.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``, the reference.

    Returns:
        [P, *feature] in the dtype of history. Sums are in float32 (float64) and rounded once. An infinite feature may
        give NaN.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, ``out`` is given while gradients are required, or
            it shares memory with another argument.
    """
    _check(history, coefficients, bias, out)
    chosen = choose_backend(backend, history)
    triton = chosen == "triton"
    fast = chosen != "torch" and len(coefficients) > 0 and is_served(history, coefficients.shape[2:], triton)
    if needs_gradient(history, coefficients, bias):
        if out is not None:
            raise ValueError("combine(..., out=) overwrites a tensor and has no gradients; call it without out=")
        if fast:
            result: Tensor = Combine.apply(history, coefficients, bias, triton)  # type: ignore[no-untyped-call]
            return result
    elif fast:
        if out is None:
            return _combine(history, coefficients, bias, triton)
        if out.is_contiguous():
            _combine_out(out, history, coefficients, bias, triton)
            return out
    result = reference.combine(history, coefficients, bias)
    return result if out is None else out.copy_(result)


class Combine(torch.autograd.Function):
    """Gradients of the registered operation; those of gradients come from the reference."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, coefficients: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
        ctx.save_for_backward(history, coefficients)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.triton = triton
        return _combine(history, coefficients, bias, triton)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        history, coefficients = ctx.saved_tensors
        channels = coefficients.shape[2:]
        twice = torch.is_grad_enabled() and needs_gradient(grad, history, coefficients)
        by_history = by_coefficients = by_bias = None
        if ctx.needs_input_grad[0]:
            transposed = coefficients.transpose(0, 1)
            if not twice and is_served(grad := grad.contiguous(), channels, ctx.triton):
                by_history = _combine(grad, transposed.contiguous(), None, ctx.triton)
            else:
                by_history = reference.combine(grad, transposed, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if twice:
                by_coefficients, by_bias = reference.gradients(grad, history, tuple(channels))
            else:
                by_coefficients, by_bias = _combine_gradients(grad.contiguous(), history, channels, ctx.triton)
            by_coefficients = by_coefficients.to(coefficients.dtype)
            by_bias = None if ctx.bias_dtype is None else by_bias.to(ctx.bias_dtype)
        return by_history, by_coefficients, by_bias, None


def _run_combine(history: Tensor, coefficients: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
    if not triton:
        return cpu.combine(history, coefficients, bias)
    out = history.new_empty(len(coefficients), *history.shape[1:])
    _run_combine_out(out, history, coefficients, bias, triton)
    return out


def _run_combine_out(out: Tensor, history: Tensor, coefficients: Tensor, bias: Tensor | None, triton: bool) -> None:
    if triton:
        from . import launch

        launch.combine(out, history, *_float32(coefficients, bias))
    else:
        cpu.combine(history, coefficients, bias, out)


def _run_combine_gradients(
    grad: Tensor, history: Tensor, channels: Sequence[int], triton: bool
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(history.dtype, torch.float32)
    if triton:
        from . import launch

        by_coefficients, by_bias = launch.dots(grad, history, channels, sums=True)
        assert by_bias is not None
    else:
        by_coefficients, by_bias = cpu.gradients(grad, history, channels)
    shapes = (len(grad), len(history), *channels), (len(grad), *channels)
    return by_coefficients.to(accumulate).view(shapes[0]), by_bias.to(accumulate).view(shapes[1])


def _float32(coefficients: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """float32 and contiguous, as the kernels read them; no copy if they are."""
    return coefficients.float().contiguous(), None if bias is None else bias.float().contiguous()


def _fake_combine(history: Tensor, coefficients: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
    return history.new_empty(coefficients.shape[0], *history.shape[1:])


def _fake_combine_gradients(
    grad: Tensor, history: Tensor, channels: Sequence[int], triton: bool
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(history.dtype, torch.float32)
    count, m = grad.shape[0], history.shape[0]
    return grad.new_empty(count, m, *channels, dtype=accumulate), grad.new_empty(count, *channels, dtype=accumulate)


_combine = define(
    "combine(Tensor history, Tensor coefficients, Tensor? bias, bool triton) -> Tensor", _run_combine, _fake_combine
)
_combine_out = define(
    "combine_out(Tensor(a!) out, Tensor history, Tensor coefficients, Tensor? bias, bool triton) -> ()",
    _run_combine_out,
    lambda out, history, coefficients, bias, triton: None,
)
_combine_gradients = define(
    "combine_gradients(Tensor grad, Tensor history, SymInt[] channels, bool triton) -> (Tensor, Tensor)",
    _run_combine_gradients,
    _fake_combine_gradients,
)


def is_served(history: Tensor, channels: Sequence[int], triton: bool) -> bool:
    """Whether the registered operations support coefficients [P, m, *channels] on this history."""
    if not (history.is_contiguous() or has_contiguous_rows(history)):
        return False
    if not triton:
        return history.device.type == "cpu" and (len(channels) == 0 or _per_channel(history.shape[1:], channels))
    if history.dtype not in KERNEL_DTYPES or len(history) > MAX_FEATURES or history.numel() == 0:
        return False
    return segmentation(history.shape[1:], channels) is not None


def _per_channel(feature: Sequence[int], channels: Sequence[int]) -> bool:
    found = segmentation(feature, channels) if math.prod(feature) > 0 else None
    return found is not None and found[2]


def _check(history: Tensor, coefficients: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    check_tensors({"history": history, "coefficients": coefficients}, {"bias": bias, "out": out})
    if history.ndim == 0:
        raise ValueError("history [] must be [m, *feature]: the kept features, one after the other")
    m, feature = len(history), history.shape[1:]
    if coefficients.ndim < 2 or coefficients.shape[1] != m or m == 0:
        raise ValueError(
            f"coefficients {list(coefficients.shape)} must be [P, {m}, ...] for the {m} features in history"
        )
    channels = coefficients.shape[2:]
    fits = len(channels) == len(feature) and all(c in (1, n) for c, n in zip(channels, feature, strict=True))
    if channels and not fits:
        raise ValueError(
            f"coefficients {list(coefficients.shape)}: {list(channels)} does not broadcast to {list(feature)}"
        )
    if bias is not None and bias.shape != (len(coefficients), *channels):
        raise ValueError(f"bias {list(bias.shape)} must be {[len(coefficients), *channels]}, as the coefficients are")
    if out is not None:
        _check_out(out, history, coefficients, bias)


def _check_out(out: Tensor, history: Tensor, coefficients: Tensor, bias: Tensor | None) -> None:
    shape = len(coefficients), *history.shape[1:]
    if out.shape != shape or out.dtype != history.dtype:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, the result is {history.dtype} {list(shape)}")
    if torch.compiler.is_compiling():  # a compiler handles overlap itself
        return
    for name, source in (("history", history), ("coefficients", coefficients), ("bias", bias)):
        if source is not None and overlap(out, source):
            raise ValueError(f"out shares memory with {name}, which is read while out is written; give it its own")
