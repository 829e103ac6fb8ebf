"""The launch of the Triton kernel. It imports Triton, so ``op.py`` imports it at the first launch."""

import torch
import triton
from torch import Tensor

from ...launching import on_device, steps_of_program, vector_size
from . import kernels

LANES = 128
BYTES = 256  # of each feature in a thread, so that the reduction over threads at the end is cheap in comparison
OPTIONS = {"num_warps": LANES // 32}


def prediction_error(history: Tensor, coefficients: Tensor, feature: Tensor, bias: Tensor | None) -> Tensor:
    """history [m, *feature] with every feature contiguous, coefficients float32 [m], bias float32 [] -> float64 [2]."""
    length, row_stride = feature.numel(), history.stride(0)
    vector = vector_size(history, feature, counts=(length, row_stride))
    blocks = triton.cdiv(length, LANES * vector)
    steps = steps_of_program(blocks, BYTES // (history.element_size() * vector))
    programs = triton.cdiv(blocks, steps)
    sums = history.new_empty(2, programs, dtype=torch.float32)
    with on_device(history):
        kernels.prediction_error_kernel[(programs,)](
            history,
            coefficients,
            bias,
            feature,
            sums,
            row_stride // vector,
            length // vector,
            steps,
            M=len(history),
            VEC=vector,
            LANES=LANES,
            **OPTIONS,
        )
    return sums.sum(1, dtype=torch.float64)
