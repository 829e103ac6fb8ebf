"""Launches of the Triton kernels. It imports Triton, so ``op.py`` imports it at the first launch."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ...launching import on_device, steps_of_program, vector_size
from . import kernels
from .segments import (
    PREDICTIONS,
    PREDICTIONS_PER_CHANNEL,
    THREADS,
    block,
    group,
    most_predictions,
    segmentation,
)

COMBINE_OPTIONS = {"num_warps": THREADS // 32}
# By default ptxas limits itself to 48 or 128 registers and spills one or two.
DOTS_OPTIONS = {"num_warps": THREADS // 32, "maxnreg": 255}


def combine(out: Tensor, history: Tensor, coefficients: Tensor, bias: Tensor | None) -> None:
    """Writes out [P, *feature].

    history [m, *feature], m <= MAX_FEATURES, every feature contiguous; coefficients float32 [P, m, *c], bias [P, *c];
    out contiguous, in the dtype of history.
    """
    segments, length, per_channel = _segmentation(history.shape[1:], coefficients.shape[2:])
    m, row_stride = len(history), history.stride(0)
    vector = vector_size(history, out, counts=(length, row_stride))
    size = block(m, history.element_size(), per_channel)
    programs = segments * triton.cdiv(length, size)
    step = PREDICTIONS_PER_CHANNEL if per_channel else PREDICTIONS
    with on_device(history):
        for first in range(0, len(coefficients), step):
            part = slice(first, first + step)
            kernels.combine_kernel[(programs,)](
                history,
                coefficients[part],
                None if bias is None else bias[part],
                out[part],
                row_stride // vector,
                length // vector,
                segments,
                P=min(step, len(coefficients) - first),
                M=m,
                PER_CHANNEL=per_channel,
                VEC=vector,
                BLOCK=size,
                **COMBINE_OPTIONS,
            )


def dots(left: Tensor, history: Tensor, channels: Sequence[int], sums: bool) -> tuple[Tensor, Tensor | None]:
    """Inner products of left [P, *feature] with history [m, *feature], float64 [P, m, *channels].

    With ``sums``, also the sums of left alone, [P, *channels]. left is contiguous, history as for ``combine``.
    """
    segments, length, per_channel = _segmentation(history.shape[1:], channels)
    m, row_stride = len(history), history.stride(0)
    vector = vector_size(history, left, counts=(length, row_stride))
    blocks = triton.cdiv(length, THREADS * vector)
    if per_channel:
        # at most 32 partial results, since each is as large as the coefficients and is written to memory
        steps = min(segments, max(16, triton.cdiv(segments, 32)))
        spans, programs, columns = triton.cdiv(segments, steps), blocks, length
    else:
        # at most 256 bytes for each thread, so that the reduction over threads at the end is cheap in comparison
        steps = steps_of_program(segments * blocks, 256 // (history.element_size() * vector))
        spans, programs, columns = triton.cdiv(blocks, steps), segments, segments
    most = most_predictions(per_channel)
    results, totals = [], []
    with on_device(history):
        for first in range(0, len(left), most):
            rows = left[first : first + most]
            together = group(m, len(rows), per_channel)
            partial = history.new_empty(spans, len(rows), m, columns, dtype=torch.float32)
            partial_sums = history.new_empty(spans, len(rows), columns, dtype=torch.float32) if sums else None
            kernels.dots_kernel[(spans * programs, triton.cdiv(m, together))](
                rows,
                history,
                partial,
                partial_sums,
                row_stride // vector,
                length // vector,
                segments,
                steps,
                P=len(rows),
                M=m,
                GROUP=together,
                PER_CHANNEL=per_channel,
                VEC=vector,
                LANES=THREADS,
                **DOTS_OPTIONS,
            )
            results.append(partial.sum(0, dtype=torch.float64))
            if partial_sums is not None:
                totals.append(partial_sums.sum(0, dtype=torch.float64))
    result = torch.cat(results).view(len(left), m, *channels)
    return result, torch.cat(totals).view(len(left), *channels) if sums else None


def _segmentation(feature: Sequence[int], channels: Sequence[int]) -> tuple[int, int, bool]:
    found = segmentation(feature, channels)
    assert found is not None, "the caller asks segmentation first"
    return found
