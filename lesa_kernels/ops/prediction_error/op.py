"""``prediction_error`` as callers and PyTorch see it: arguments checked, implementation chosen."""

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import KERNEL_DTYPES, check_feature, check_tensors, needs_gradient
from ...library import define
from ..combine.segments import MAX_FEATURES
from . import reference


def prediction_error(
    history: Tensor, coefficients: Tensor, feature: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The squared error of a combination: ``sum (feature - sum_j coefficients[j] history[j] - bias)^2``.

    Args:
        history: [m, *feature], m >= 1, float32, bfloat16, float16 or float64.
        coefficients: [m], float32 (float64 for a float64 history).
        feature: the true feature [*feature], in the dtype of history.
        bias: [], in the dtype of the coefficients.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``; the last two are the reference.

    Returns:
        float64 [2] on the device: that sum, and ``sum feature^2``. The square root of their ratio is the relative
        error. Everything is read once; a GPU adds squares in float32 within parts of the feature and in float64 between
        them, a CPU in float64.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    _check(history, coefficients, feature, bias)
    triton = choose_backend(backend, history) == "triton"
    tensors = (history, coefficients, feature, bias)
    if needs_gradient(*tensors) or not triton or not _served(history):
        return reference.prediction_error(history, coefficients, feature, bias)
    return _operation(history, coefficients, feature, bias)


def _run(history: Tensor, coefficients: Tensor, feature: Tensor, bias: Tensor | None) -> Tensor:
    from . import launch

    bias = None if bias is None else bias.float()
    return launch.prediction_error(history, coefficients.float().contiguous(), feature.contiguous(), bias)


_operation = define(
    "prediction_error(Tensor history, Tensor coefficients, Tensor feature, Tensor? bias) -> Tensor",
    _run,
    lambda history, coefficients, feature, bias: history.new_empty(2, dtype=torch.float64),
)


def _served(history: Tensor) -> bool:
    return (
        history.dtype in KERNEL_DTYPES
        and len(history) <= MAX_FEATURES
        and history.numel() > 0
        and history[0].is_contiguous()
    )


def _check(history: Tensor, coefficients: Tensor, feature: Tensor, bias: Tensor | None) -> None:
    check_tensors({"history": history, "coefficients": coefficients, "feature": feature}, {"bias": bias})
    if history.ndim == 0 or len(history) == 0 or coefficients.shape != history.shape[:1]:
        raise ValueError(f"coefficients {list(coefficients.shape)} must be [m] for history {list(history.shape)}")
    check_feature(history, feature)
    if bias is not None and bias.ndim != 0:
        raise ValueError(f"bias {list(bias.shape)} must be one number, []")
