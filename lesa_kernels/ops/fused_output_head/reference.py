"""``fused_output_head`` in plain PyTorch: the specification.

    x[p]   = sum_j coefficients[p, j] * history[j] + bias[p]
    n[p]   = (x[p] - mean_D x[p]) / sqrt(var_D x[p] + eps)                    layer norm over the channels
    out[p] = (n[p] * multiplier[p] + addend[p]) @ weight.T + projection_bias

or, with weights, the sum of these over the predictions:

    out = sum_p weights[p] * ((n[p] * multiplier[p] + addend[p]) @ weight.T + projection_bias)

All of it in float32 at least, and rounded once.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ...checks import autocast_device


def fused_output_head(
    history: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    eps: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Differentiable, any float dtype.

    history [m, B, *tokens, D]; coefficients [P, m]; bias [P]; multiplier, addend [P, B or 1, D]; weight [O, D];
    projection_bias [O] -> [P, B, *tokens, O] in the dtype of history; with weights [P] -> [B, *tokens, O].
    """
    exact = torch.promote_types(history.dtype, torch.float32)
    count, channels, tokens = len(coefficients), history.shape[-1], history.ndim - 3
    with torch.autocast(autocast_device(history), enabled=False):  # which would round the operands of the projection
        c = coefficients.to(exact).reshape(*coefficients.shape, *(1,) * (history.ndim - 1))
        x = c[:, 0] * history[0].to(exact)
        for j in range(1, len(history)):
            x = x + c[:, j] * history[j].to(exact)
        if bias is not None:
            x = x + bias.to(exact).reshape(count, *(1,) * (history.ndim - 1))
        n = functional.layer_norm(x, (channels,), eps=eps)
        scale, shift = (t.to(exact).reshape(count, t.shape[1], *(1,) * tokens, channels) for t in (multiplier, addend))
        y = n * scale + shift  # [P, B, *tokens, D]
        offset = None if projection_bias is None else projection_bias.to(exact)
        out = functional.linear(y, weight.to(exact), offset)
        if weights is not None:
            out = torch.tensordot(weights.to(exact), out, 1)
        return out.to(history.dtype)
