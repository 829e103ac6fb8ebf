"""``fused_output_head`` on a CPU: the reference for small inputs, else as few passes over memory as possible.

Tiles are large, since an operator costs 10 us with two threads: for 6 predictions from 7 centred features [256, 16, 96]
in float32, one tile, and tiles of 2^20, 2^18 and 2^17 elements take 3.3, 3.5, 4.5 and 6.0 ms on 2 cores, and 4.3, 4.1,
4.7 and 5.8 ms on one.

A weighted sum of the predictions needs none of them. A prediction is a combination of m features, so its length follows
from the m * m scalar products of a token's features, and with the lengths known the sum is linear in the features:

    sum_p weights[p] * n[p] * multiplier[p]
        = sum_j history[j] * (sum_p weights[p] * coefficients[p, j] / deviation[p] * multiplier[p])

A tile holds the m features and as many factors of them, not P predictions, and is projected once. For 20 predictions
from 3 features this is 3.5 to 5 times as fast as 20 outputs and their sum: 56 instead of 257 ms for [1, 1024, 3072] to
64 outputs, on one core.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

FEW = 1 << 15  # elements of all predictions together; layer_norm takes 0.5 ms for a million, 5 times as long as a pass
TILE = 1 << 20  # 4 MB in float32
SUM_TILE = 1 << 17  # of a weighted sum, elements of its features: with copies in float64 they stay in the L2 cache
SUM_TOKENS = 16  # at least, since matrix products with fewer rows take longer


def fused_output_head(
    history: Tensor,
    coefficients: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    weights: Tensor | None,
    eps: float,
    centred: bool,
) -> Tensor:
    """As the reference, without the bias, which the norm removes.

    history [m, B, *tokens, D], every feature contiguous, and every token without its mean if ``centred``;
    coefficients [P, m]; multiplier and addend [P, B or 1, D]; weight [O, D]; projection_bias [O]; weights [P]
    -> [P, B, *tokens, O], with weights [B, *tokens, O].
    """
    if torch.is_autocast_enabled("cpu"):  # autocast would round the operands
        with torch.autocast("cpu", enabled=False):
            return fused_output_head(
                history, coefficients, multiplier, addend, weight, projection_bias, weights, eps, centred
            )
    exact = torch.promote_types(history.dtype, torch.float32)
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    shape = count, *history.shape[1:-1], outputs
    coefficients, weight = coefficients.to(exact), weight.to(exact)
    bias = None if projection_bias is None else projection_bias.to(exact)
    if weights is not None:
        weights = weights.to(exact)
        bias = None if bias is None else bias * weights.sum()
    scale, shift = multiplier.to(exact).unsqueeze(2), addend.to(exact).unsqueeze(2)  # [P, B or 1, 1, D]
    if count * samples * tokens * channels <= FEW:
        x = torch.mm(coefficients, history.to(exact).view(m, -1)).view(count, samples, tokens, channels)
        x = torch.addcmul(shift, functional.layer_norm(x, (channels,), eps=eps), scale)
        if weights is not None:  # the sum first: one projection instead of P
            x, shape = torch.mv(x.view(count, -1).t(), weights).view(-1, channels), shape[1:]
        return functional.linear(x, weight, bias).view(shape).to(history.dtype)
    if multiplier.shape[1] == addend.shape[1] == 1:  # if all samples share it, they are one long sample
        samples, tokens = 1, samples * tokens
    features = history.view(m, samples, tokens, channels)
    if weights is not None:
        total = torch.mv(shift.reshape(count, -1).t(), weights).view(-1, 1, channels)
        offset = _linear(total, weight, bias).expand(samples, -1, -1)
        return _weighted_sum(features, coefficients, scale, offset, weight, weights, eps, centred).view(shape[1:])
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


def _weighted_sum(
    features: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight: Tensor,
    weights: Tensor,
    eps: float,
    centred: bool,
) -> Tensor:
    """features [m, B, T, D]; scale [P, B or 1, 1, D]; offset [B, 1, O], summed and projected -> [B, T, O]."""
    (m, samples, tokens, channels), count, exact = features.shape, len(coefficients), coefficients.dtype
    weights = weights * math.sqrt(channels)
    floor = coefficients.new_full((), math.sqrt(channels * eps))
    wide, shares = coefficients.double(), (coefficients.t() * weights).contiguous().unsqueeze(1)  # [m, 1, P]
    pairs = (wide.unsqueeze(2) * wide.unsqueeze(1)).view(count, m * m).t()
    # From 3 P products of features on, predictions take less time. And float64 has no wider dtype for the products.
    direct = m * m > 3 * count or exact == torch.float64
    scale = scale.expand(-1, samples, -1, -1)
    by_sample = scale.squeeze(2).transpose(0, 1)  # [B, P, D]
    out = features.new_empty(samples, tokens, len(weight))
    for b, t in _tiles(samples, tokens, max(SUM_TOKENS, SUM_TILE // (channels * (count if direct else m)))):
        tile = features[:, b, t].to(exact)
        tile = tile if centred else tile - tile.mean(-1, keepdim=True)
        size = tile.shape[1:3]
        if direct:
            x = torch.mm(coefficients, tile.reshape(m, -1)).view(count, *size, channels)
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)  # sqrt(D (variance + eps))
            x = x.mul_(scale[:, b]).mul_(weights.view(-1, 1, 1, 1) / length).sum(0)
        else:  # the products in float64: large ones may cancel to a short length
            rows = tile.double().reshape(m, -1, channels).transpose(0, 1)
            products = torch.bmm(rows, rows.mT).view(-1, m * m)
            length = torch.mm(products, pairs).clamp_(min=0).sqrt_().to(exact).hypot_(floor)
            factors = (shares / length.view(size[0], 1, -1, count)).view(size[0], -1, count)  # [B, m * T, P]
            x = torch.bmm(factors, by_sample[b]).view(-1, m, size[1], channels)
            x = x.mul_(tile.transpose(0, 1)).sum(1)
        projected = torch.mm(x.view(-1, channels), weight.t()).view(*size, -1)
        torch.add(projected, offset[b], out=out[b, t])
    return out


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
