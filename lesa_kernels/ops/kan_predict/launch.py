"""Launches of the Triton kernels. It imports Triton, so ``op.py`` imports it at the first launch.

Settings follow from shapes, dtypes and alignment alone. They were chosen by the compiled code for sm_90 (registers,
width of accesses), not by measurements on a GPU.
"""

import math

import torch
import triton
from torch import Tensor

from ...launching import on_device, vector_size
from . import kernels

LANES, WARPS = 128, 4  # one vector of 16 bytes a thread: two would double the 200 registers of K = 8, P = 6


def kan_predict(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    *,
    order: int,
    grid_range: tuple[float, float],
) -> Tensor:
    """As the reference, for a history in float32, float16 or bfloat16 of at least one element and order 1 to 3."""
    (window, *feature), steps, bases = history.shape, len(gates), spline_weight.shape[-1]
    if not history[0].is_contiguous():
        history = history.contiguous()
    out = history.new_empty(steps, *feature)
    length, row_stride, channels = math.prod(feature), history.stride(0), feature[-1]
    vec = vector_size(history, counts=(length, row_stride, length if scale is None else channels))

    width = triton.next_power_of_2(bases + 2 * order + 2)
    table = history.new_empty(steps, window + 1, width, dtype=torch.float32)
    low, high = grid_range
    knots_per_unit = (bases - order) / (high - low)

    with on_device(history):
        kernels.fold_kernel[(steps,)](
            table,
            gates.contiguous(),
            linear_weight.contiguous(),
            base_weight.contiguous(),
            spline_weight.contiguous(),
            bias.contiguous(),
            len(bias),
            K=window,
            C=bases,
            ORDER=order,
            ROWS=triton.next_power_of_2(window + 1),
            WIDTH=width,
            num_warps=WARPS,
        )
        kernels.predict_kernel[(triton.cdiv(length // vec, LANES),)](
            history,
            table,
            None if scale is None else scale.contiguous(),
            out,
            length // vec,
            row_stride // vec,
            channels // vec,
            knots_per_unit,
            order - low * knots_per_unit,
            K=window,
            P=steps,
            C=bases,
            ORDER=order,
            WIDTH=width,
            VEC=vec,
            LANES=LANES,
            num_warps=WARPS,
        )
    return out
