"""``head`` on a CPU: as few passes as PyTorch's operators allow, over tiles whose predictions share one buffer.

A tile is large, since an operator costs 10 us with two threads: for 6 predictions from 7 centred features [256, 16, 96]
in float32, tiles of 2^17, 2^19 and 2^21 elements take 2.2, 1.9 and 1.5 ms (2 cores). A single sample is one tile.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 21  # elements of all predictions together, 8 MB in float32


def head(
    history: Tensor,
    coefficients: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    eps: float,
    centred: bool,
) -> Tensor:
    """As the reference, without the bias, which the norm takes away.

    history [m, B, *tokens, D], every feature contiguous, and every token without its mean if ``centred``;
    coefficients [P, m]; multiplier and addend [P, B or 1, D]; weight [O, D]; projection_bias [O] -> [P, B, *tokens, O].
    """
    if torch.is_autocast_enabled("cpu"):  # it would round the operands of every product
        with torch.autocast("cpu", enabled=False):
            return head(history, coefficients, multiplier, addend, weight, projection_bias, eps, centred)
    exact = torch.promote_types(history.dtype, torch.float32)
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    out = history.new_empty(count, *history.shape[1:-1], outputs)
    if multiplier.shape[1] == addend.shape[1] == 1:  # what all samples share makes one long sample of them
        samples, tokens = 1, samples * tokens
    features, results = history.view(m, samples, tokens, channels), out.view(count, samples, tokens, outputs)
    coefficients, weight = coefficients.to(exact), weight.to(exact)
    bias = None if projection_bias is None else projection_bias.to(exact)
    scale = multiplier.to(exact).unsqueeze(2).expand(-1, samples, -1, -1)  # [P, B, 1, D]
    offset = torch.nn.functional.linear(addend.to(exact).unsqueeze(2), weight, bias).expand(-1, samples, -1, -1)
    floor = coefficients.new_full((), math.sqrt(channels * eps))
    most = max(1, TILE // (count * channels))  # tokens of a tile
    buffer = coefficients.new_empty(count * channels * min(most, samples * tokens))
    for b, t in _tiles(samples, tokens, most):
        tile = features[:, b, t]
        x = buffer[: count * tile[0].numel()].view(count, *tile.shape[1:])
        torch.mm(coefficients, tile.to(exact).reshape(m, -1), out=x.view(count, -1))
        # A layer norm in pieces: dividing by the deviation waits for the projection, which leaves fewer to divide.
        if not centred:
            x -= x.mean(-1, keepdim=True)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)  # sqrt(D (variance + eps))
        x *= scale[:, b]
        projected = torch.mm(x.view(-1, channels), weight.t()).view(*x.shape[:-1], outputs)
        torch.addcdiv(offset[:, b], projected, length, value=math.sqrt(channels), out=results[:, b, t])
    return out


def _tiles(samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Even parts of at most ``most`` tokens, one at least: whole samples, or of a long one some of its tokens."""
    for sample in _even(samples, max(1, most // tokens)):
        for token in _even(tokens, most):
            yield sample, token


def _even(size: int, most: int) -> Iterator[slice]:
    """Parts of ``size`` of nearly equal lengths, none longer than ``most``."""
    span = math.ceil(size / math.ceil(size / most))
    for start in range(0, size, span):
        yield slice(start, start + span)
