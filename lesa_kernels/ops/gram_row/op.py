"""``gram_row`` as callers and PyTorch see it. Its kernel is the one that makes the gradients of ``combine``."""

import torch
from torch import Tensor

from ...backend import choose_backend
from ...checks import check_feature, check_tensors, needs_gradient
from ...library import define
from ..combine import cpu
from ..combine.op import is_served
from . import reference


def gram_row(history: Tensor, feature: Tensor, *, backend: str = "auto") -> Tensor:
    """Inner products of one feature with all kept ones, ``row[j] = <history[j], feature>``: a row of a Gram matrix.

    Args:
        history: [m, *feature], float32, bfloat16, float16 or float64.
        feature: [*feature], in the dtype of history.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``, the reference.

    Returns:
        float64 [m]. History and feature are read once. A GPU adds products in float32 within parts of the feature and
        in float64 between them, a CPU in float64, both in a fixed order.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    check_tensors({"history": history, "feature": feature})
    check_feature(history, feature)
    chosen = choose_backend(backend, history)
    triton = chosen == "triton"
    if chosen == "torch" or needs_gradient(history, feature) or not is_served(history, (), triton):
        return reference.gram_row(history, feature)
    return _operation(history, feature, triton)


def _run(history: Tensor, feature: Tensor, triton: bool) -> Tensor:
    if not triton:
        return cpu.gram_row(history, feature)
    from ..combine import launch

    return launch.dots(feature.contiguous().unsqueeze(0), history, (), sums=False)[0][0]


def _fake(history: Tensor, feature: Tensor, triton: bool) -> Tensor:
    return history.new_empty(history.shape[0], dtype=torch.float64)


_operation = define("gram_row(Tensor history, Tensor feature, bool triton) -> Tensor", _run, _fake)
