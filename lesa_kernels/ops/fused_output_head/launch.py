"""Launches of the Triton kernel. It imports Triton, so ``op.py`` imports it at the first launch."""

import math

import torch
import triton
from torch import Tensor
from torch.nn import functional

from ...launching import on_device, vector_size
from . import kernels
from .tiles import TOKENS, tiles

# float32 features are multiplied in float32: three products in tf32 are faster, but less accurate than eager float32.
PRECISION = {torch.bfloat16: "ieee", torch.float16: "tf32", torch.float32: "ieee"}


def fused_output_head(
    history: Tensor,
    coefficients: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    weights: Tensor | None,
    means: Tensor | None,
    eps: float,
) -> Tensor:
    """As the reference, without the bias, which the norm removes.

    history [m, B, *tokens, D], m <= MAX_FEATURES, every feature contiguous; coefficients [P, m]; multiplier and addend
    [P, B or 1, D]; weight [O, D], O <= MAX_OUTPUTS; projection_bias [O]; weights [P]; means [m, B, *tokens]
    -> [P, B, *tokens, O], with weights [B, *tokens, O].
    """
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    modulated = max(multiplier.shape[1], addend.shape[1])
    if modulated == 1:  # if all samples share it, they are one long sample
        samples, tokens = 1, samples * tokens
    multiplier = multiplier.expand(-1, modulated, -1).contiguous()
    offset = None if projection_bias is None else projection_bias.float()
    addend, shares = addend.float(), None if weights is None else weights.float().contiguous()
    with torch.autocast(history.device.type, enabled=False):
        if shares is not None:
            addend = torch.tensordot(shares, addend, 1)
            offset = None if offset is None else offset * shares.sum()
        table = functional.linear(addend, weight.float(), offset)
    table = table.expand(*table.shape[:-2], modulated, -1).contiguous()  # [P, B or 1, O], of a sum [B or 1, O]
    weight = weight.to(history.dtype).contiguous()
    means = history.mean(-1, dtype=torch.float32) if means is None else means.float().contiguous()

    row_stride = history.stride(0)
    vector = vector_size(history, weight, multiplier, counts=(channels, row_stride))
    short, summed = history.dtype == torch.bfloat16, weights is not None
    itemsize = history.element_size()
    shape = tiles(count, m, outputs, channels, itemsize=itemsize, vector=vector, short=short, summed=summed)
    groups = triton.cdiv(count, shape.group)
    dtype = torch.float32 if summed and groups > 1 else history.dtype
    out = history.new_empty(groups if summed else count, *history.shape[1:-1], outputs, dtype=dtype)
    programs = samples * triton.cdiv(tokens, TOKENS) * groups
    with on_device(history):
        kernels.fused_output_head_kernel[(programs,)](
            out,
            history,
            means,
            coefficients.float().contiguous(),
            multiplier,
            table,
            weight,
            shares,
            eps,
            row_stride // vector,
            channels // vector,
            samples,
            tokens,
            modulated,
            outputs,
            count,
            P=None if summed else count,
            M=m,
            GROUP=shape.group,
            VEC=vector,
            TOKENS=TOKENS,
            CHANNELS=shape.channels,
            OUTPUTS=shape.outputs,
            OUTPUT_BLOCKS=shape.blocks,
            RAGGED=channels % shape.channels != 0,
            PRECISION=PRECISION[history.dtype],
            STAGES=shape.stages,
            SUMMED=summed,
            **shape.options,
        )
    if not summed:
        return out
    return out[0] if groups == 1 else out.sum(0).to(history.dtype)
