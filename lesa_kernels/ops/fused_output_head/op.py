"""``fused_output_head`` as callers and PyTorch see it: arguments checked, implementation chosen, gradients."""

from typing import Any

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import KERNEL_DTYPES, autocast_device, check_not_negative, check_tensors, needs_gradient
from ...library import define
from . import cpu, reference
from .tiles import MAX_FEATURES, MAX_OUTPUTS


def fused_output_head(
    history: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    means: Tensor | None = None,
    centred: bool = False,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The outputs of a transformer at several coming steps, or their weighted sum, from kept features in one pass.

        x[p]   = sum_j coefficients[p, j] history[j] + bias[p]
        n[p]   = (x[p] - mean_D x[p]) / sqrt(var_D x[p] + eps)
        out[p] = (n[p] * multiplier[p] + addend[p]) @ weight.T + projection_bias

    With ``weights`` it returns ``sum_p weights[p] out[p]``; the Triton kernel and the CPU code never write all
    ``out[p]`` to memory. It is for substeps: a call of the transformer then returns the average velocity over the
    coming interval, which is the sum of the outputs at finer times, each weighted by the length of its substep. These
    may be 20 to 200.

    Tokens are independent of each other: the result for a part of the tokens is that part of the result.

    Args:
        history: [m, B, *tokens, D], m >= 1, float32, bfloat16, float16 or float64: features of B samples; a feature
            [T, D] counts as T samples of one token.
        coefficients: [P, m], float32 (float64 for a float64 history).
        bias: [P], in the dtype of the coefficients. It is accepted so that a table can be passed as it is; the norm
            removes it, so it costs nothing.
        multiplier, addend: [P, B, D], or [P, 1, D] for all samples: each step's ``1 + scale`` and ``shift``, with a
            norm's own weight w and bias b folded in, ``w * (1 + scale)`` and ``b * (1 + scale) + shift``. float32
            keeps digits that the history's dtype does not have; that dtype will do.
        weight: [O, D] of the projection.
        projection_bias: [O].
        eps: of the norm, at least zero.
        means: [m, B, *tokens] float32, the :func:`token_means` of the features, if they were kept. They save the
            Triton kernel a pass over the history.
        centred: the mean of every token of the history has been subtracted. It saves a CPU two passes over each
            prediction.
        weights: [P], in the dtype of the coefficients: the weight of each prediction in the sum.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``, the reference.

    Returns:
        [P, B, *tokens, O] in the dtype of history; with weights [B, *tokens, O], zeros if P is 0. Everything is float32
        (float64) and rounded once, except that the Triton kernel rounds the operands of the projection to the dtype of
        history, as a model in that dtype does.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or ``eps`` is none.
    """
    check_not_negative(eps=eps)
    _check(history, coefficients, bias, multiplier, addend, weight, projection_bias, means, weights)
    chosen = choose_backend(backend, history)
    triton = chosen == "triton"
    if chosen == "torch" or not _served(history, coefficients, weight, triton):
        return reference.fused_output_head(
            history, coefficients, bias, multiplier, addend, weight, projection_bias, eps, weights
        )
    arguments = (history, coefficients, multiplier, addend, weight, projection_bias, weights)
    if needs_gradient(bias, *arguments):
        result: Tensor = FusedOutputHead.apply(bias, *arguments, means, eps, centred, triton)  # type: ignore[no-untyped-call]
    else:
        result = _operation(*arguments, means, eps, centred, triton)
    return result


def token_means(feature: Tensor) -> Tensor:
    """The channel mean of each token, to be kept with a feature: [*tokens, D] -> float32 [*tokens].

    :func:`fused_output_head` takes it.

    The mean of a combination of features is the combination of their means. So a single pass can subtract it before
    it squares, and what tokens have in common does not cancel the digits of their variance.

    Raises:
        ValueError: for what is no float tensor with channels.
    """
    check_tensors({"feature": feature})
    if feature.ndim == 0:
        raise ValueError("feature [] must be [*tokens, D]")
    return feature.mean(-1, dtype=torch.float32)


class FusedOutputHead(torch.autograd.Function):
    """The registered operation with the gradients of the reference, which runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, *arguments: Any) -> Tensor:
        *tensors, _means, ctx.eps, _centred, _triton = arguments
        ctx.save_for_backward(bias, *tensors)
        result: Tensor = _operation(*arguments)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed, eps = ctx.saved_tensors, ctx.needs_input_grad, ctx.eps
        wanted = [i for i, tensor in enumerate(tensors) if tensor is not None and needed[i]]

        def outputs(*changed: Tensor) -> Tensor:
            bias, history, coefficients, multiplier, addend, weight, projection_bias, weights = (
                changed[wanted.index(i)] if i in wanted else tensor for i, tensor in enumerate(tensors)
            )
            return reference.fused_output_head(
                history, coefficients, bias, multiplier, addend, weight, projection_bias, eps, weights
            )

        with torch.autocast(autocast_device(grad), enabled=False):  # it would round
            pull_back = torch.func.vjp(outputs, *(tensors[i] for i in wanted))[1]
            gradients = dict(zip(wanted, pull_back(grad), strict=True))
        return *(gradients.get(i) for i in range(len(tensors))), None, None, None, None


def _run(history: Tensor, *rest: Any) -> Tensor:
    coefficients, multiplier, addend, weight, projection_bias, weights, means, eps, centred, triton = rest
    tensors = (history, coefficients, multiplier, addend, weight, projection_bias, weights)
    if not triton:
        return cpu.fused_output_head(*tensors, eps, centred)
    from . import launch

    return launch.fused_output_head(*tensors, means, eps)


_operation = define(
    "fused_output_head(Tensor history, Tensor coefficients, Tensor multiplier, Tensor addend, Tensor weight, "
    "Tensor? projection_bias, Tensor? weights, Tensor? means, float eps, bool centred, bool triton) -> Tensor",
    _run,
    lambda history, coefficients, multiplier, addend, weight, projection_bias, weights, *_: history.new_empty(
        *coefficients.shape[: 1 if weights is None else 0], *history.shape[1:-1], weight.shape[0]
    ),
)


def _served(history: Tensor, coefficients: Tensor, weight: Tensor, triton: bool) -> bool:
    """Whether the registered operation supports these tensors; else the reference runs."""
    if history.numel() == 0 or len(coefficients) == 0 or len(weight) == 0:
        return False
    if not (history.is_contiguous() or history[0].is_contiguous()):
        return False
    if not triton:
        return history.device.type == "cpu"
    return history.dtype in KERNEL_DTYPES and len(history) <= MAX_FEATURES and len(weight) <= MAX_OUTPUTS


def _check(
    history: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    means: Tensor | None,
    weights: Tensor | None,
) -> None:
    check_tensors(
        {
            "history": history,
            "coefficients": coefficients,
            "multiplier": multiplier,
            "addend": addend,
            "weight": weight,
        },
        {"bias": bias, "projection_bias": projection_bias, "means": means, "weights": weights},
    )
    if history.ndim < 3 or len(history) == 0:
        raise ValueError(f"history is {list(history.shape)}, it must be [m, B, ..., D] with m >= 1")
    (m, samples), channels = history.shape[:2], history.shape[-1]
    if coefficients.ndim != 2 or coefficients.shape[1] != m:
        raise ValueError(f"coefficients {list(coefficients.shape)} must be [P, {m}] for the {m} features in history")
    count = len(coefficients)
    if bias is not None and bias.shape != (count,):
        raise ValueError(f"bias {list(bias.shape)} must be [{count}], one number for each prediction")
    rows = (count, samples, channels), (count, 1, channels)
    for name, tensor in (("multiplier", multiplier), ("addend", addend)):
        if tensor.shape not in rows:
            raise ValueError(
                f"{name} {list(tensor.shape)} must be [{count}, {samples} or 1, {channels}]: one row of channels for "
                f"each prediction and each of the {samples} samples in history {list(history.shape)}"
            )
    if weight.ndim != 2 or weight.shape[1] != channels:
        raise ValueError(f"weight {list(weight.shape)} must be [O, {channels}], as history has {channels} channels")
    if projection_bias is not None and projection_bias.shape != weight.shape[:1]:
        raise ValueError(f"projection_bias {list(projection_bias.shape)} must be [{len(weight)}], as weight has rows")
    if means is not None and means.shape != history.shape[:-1]:
        raise ValueError(f"means {list(means.shape)} must be {list(history.shape[:-1])}, one for each token of history")
    if weights is not None and (weights.shape != (count,) or weights.dtype != coefficients.dtype):
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}, they must be {coefficients.dtype} [{count}], one "
            "number for each prediction, in the dtype of the coefficients"
        )
