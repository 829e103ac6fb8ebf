"""``head`` on a CPU: combination, layer norm, modulation and projection of tiles that stay in the cache.

The features of all predictions together would be a temporary of up to twice the size of the history, and three passes
over it through memory: for 6 predictions from 10 features [256, 16, 96] in float32 that takes 11 ms and in tiles
4.8 ms, of which 2.9 ms are the combination alone (one core). A single sample is one tile.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 19  # elements of all predictions together, 2 MB in float32


def head(
    history: Tensor,
    coefficients: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    weight: Tensor,
    projection_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """As the reference, without the bias, which the norm takes away.

    history [m, B, *tokens, D], every feature contiguous; coefficients [P, m]; multiplier and addend [P, B or 1, D];
    weight [O, D]; projection_bias [O] -> [P, B, *tokens, O].
    """
    if torch.is_autocast_enabled("cpu"):  # it would round the operands of every product
        with torch.autocast("cpu", enabled=False):
            return head(history, coefficients, multiplier, addend, weight, projection_bias, eps)
    exact = torch.promote_types(history.dtype, torch.float32)
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    if multiplier.shape[1] == addend.shape[1] == 1:  # what all samples share makes one long sample of them
        samples, tokens = 1, samples * tokens
    features = history.view(m, samples, tokens, channels)
    coefficients, weight = coefficients.to(exact), weight.to(exact)
    scale = multiplier.to(exact).unsqueeze(2)  # [P, B or 1, 1, D]
    offset = torch.nn.functional.linear(
        addend.to(exact).unsqueeze(2), weight, None if projection_bias is None else projection_bias.to(exact)
    )  # what the addend becomes, [P, B or 1, 1, O]

    def outputs_of(tile: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        x = torch.mm(coefficients, tile.to(exact).reshape(m, -1)).view(count, *tile.shape[1:])
        # A layer norm in pieces: dividing by the deviation waits for the projection, which leaves fewer to divide.
        x -= x.mean(-1, keepdim=True)
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(channels).add_(eps).rsqrt_()
        x *= scale
        result = torch.mm(x.view(-1, channels), weight.t()).view(*x.shape[:-1], outputs)
        return torch.addcmul(offset, result, inverse)

    shape = count, *history.shape[1:-1], outputs
    most = TILE // (count * channels)  # tokens of a tile
    if samples * tokens <= most:
        return outputs_of(features, scale, offset).view(shape).to(history.dtype)
    out = history.new_empty(count, samples, tokens, outputs)
    for b, t in _tiles(samples, tokens, most):
        out[:, b, t] = outputs_of(
            features[:, b, t], *(s if s.shape[1] == 1 else s[:, b] for s in (scale, offset))
        )  # [P, samples of the tile, tokens of the tile, O]
    return out.view(shape)


def _tiles(samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Parts of at most ``most`` tokens, one at least: whole samples, or of a long one some of its tokens."""
    together = max(1, most // tokens)
    span = min(tokens, max(1, most))
    for sample in range(0, samples, together):
        for token in range(0, tokens, span):
            yield slice(sample, sample + together), slice(token, token + span)
