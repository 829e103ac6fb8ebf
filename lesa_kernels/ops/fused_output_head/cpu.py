"""``fused_output_head`` on a CPU: the reference for small inputs, else as few passes over memory as possible.

Tiles are large, since an operator costs 10 us with two threads: for 6 predictions from 7 centred features [256, 16, 96]
in float32, one tile, and tiles of 2^20, 2^18 and 2^17 elements take 3.3, 3.5, 4.5 and 6.0 ms on 2 cores, and 4.3, 4.1,
4.7 and 5.8 ms on one.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

FEW = 1 << 15  # elements of all predictions together; layer_norm takes 0.5 ms for a million, 5 times as long as a pass
TILE = 1 << 20  # 4 MB in float32


def fused_output_head(
    history: Tensor,
    coefficients: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    eps: float,
    centred: bool,
) -> Tensor:
    """As the reference, without the bias, which the norm removes.

    history [m, B, *tokens, D], every feature contiguous, and every token without its mean if ``centred``;
    coefficients [P, m]; multiplier and addend [P, B or 1, D]; weight [O, D]; projection_bias [O] -> [P, B, *tokens, O].
    """
    if torch.is_autocast_enabled("cpu"):  # autocast would round the operands
        with torch.autocast("cpu", enabled=False):
            return fused_output_head(history, coefficients, multiplier, addend, weight, projection_bias, eps, centred)
    exact = torch.promote_types(history.dtype, torch.float32)
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    shape = count, *history.shape[1:-1], outputs
    coefficients, weight = coefficients.to(exact), weight.to(exact)
    bias = None if projection_bias is None else projection_bias.to(exact)
    scale, shift = multiplier.to(exact).unsqueeze(2), addend.to(exact).unsqueeze(2)  # [P, B or 1, 1, D]
    if count * samples * tokens * channels <= FEW:
        x = torch.mm(coefficients, history.to(exact).view(m, -1)).view(count, samples, tokens, channels)
        x = torch.addcmul(shift, functional.layer_norm(x, (channels,), eps=eps), scale)
        return functional.linear(x, weight, bias).view(shape).to(history.dtype)
    if multiplier.shape[1] == addend.shape[1] == 1:  # if all samples share it, they are one long sample
        samples, tokens = 1, samples * tokens
    features = history.view(m, samples, tokens, channels)
    out = history.new_empty(count, samples, tokens, outputs)
    scale, offset = (t.expand(-1, samples, -1, -1) for t in (scale, _linear(shift, weight, bias)))
    floor = coefficients.new_full((), math.sqrt(channels * eps))
    for b, t in _tiles(samples, tokens, max(1, TILE // (max(count, m) * channels))):
        tile = features[:, b, t].to(exact)
        # Subtract the mean before the sums: a large common value would leave rounding errors, which the division by a
        # small deviation would increase.
        tile = tile if centred else tile - tile.mean(-1, keepdim=True)
        x = torch.mm(coefficients, tile.reshape(m, -1)).view(count, *tile.shape[1:])
        # the division by the deviation comes after the projection, where fewer numbers are left
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)  # sqrt(D (variance + eps))
        x *= scale[:, b]
        projected = torch.mm(x.view(-1, channels), weight.t()).view(*x.shape[:-1], outputs)
        torch.addcdiv(offset[:, b], projected, length, value=math.sqrt(channels), out=out[:, b, t])
    return out.view(shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All rows in one product; a product for each row of [..., 1, D] would take four times as long."""
    return functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def _tiles(samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Even parts of at most ``most`` tokens: whole samples, or of a long one some of its tokens."""
    for sample in _even(samples, max(1, most // tokens)):
        for token in _even(tokens, most):
            yield sample, token


def _even(size: int, most: int) -> Iterator[slice]:
    """Parts of ``size`` of nearly equal lengths, none longer than ``most``."""
    span = math.ceil(size / math.ceil(size / most))
    for start in range(0, size, span):
        yield slice(start, start + span)
