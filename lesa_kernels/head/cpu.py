"""``head`` on a CPU: a matrix product, a layer norm, a modulation and a projection for tiles that stay in the cache.

The features of all predictions together would be a temporary of up to twice the size of the history, and three passes
over it through memory: at 10 features and 6 predictions of [256, 16, 96] in float32 that takes 11 ms, tiles 4.8 ms, of
which the combination alone is 2.9 ms (one core).
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
    """As the reference, for a history whose features are contiguous; the bias of the combination is taken away by the norm.

    history [m, B, *tokens, D], coefficients [P, m], multiplier and addend [P, B or 1, D], weight [O, D],
    projection_bias [O] -> [P, B, *tokens, O].
    """
    exact = torch.promote_types(history.dtype, torch.float32)
    (m, samples), (outputs, channels), count = history.shape[:2], weight.shape, len(coefficients)
    tokens = math.prod(history.shape[2:-1])
    if multiplier.shape[1] == addend.shape[1] == 1:  # what all samples share makes one long sample of them
        samples, tokens = 1, samples * tokens
    features = history.view(m, samples, tokens, channels)
    coefficients, multiplier, addend, projection = (t.to(exact) for t in (coefficients, multiplier, addend, weight.T))
    offset = None if projection_bias is None else projection_bias.to(exact)
    scale = multiplier.expand(-1, samples, -1).unsqueeze(2)
    shift = addend.expand(-1, samples, -1).unsqueeze(2)  # [P, B, 1, D]

    out = history.new_empty(count, samples, tokens, outputs)
    for b, t in _tiles(samples, tokens, TILE // (count * channels or 1)):
        tile = features[:, b, t].to(exact)  # [m, samples and tokens of the tile, D]
        # functions with out= are left alone by autocast, which would round the operands
        x = tile.new_empty(count, *tile.shape[1:])
        torch.mm(coefficients, tile.reshape(m, -1), out=x.view(count, -1))
        y = torch.native_layer_norm(x, (channels,), None, None, eps)[0]
        torch.addcmul(shift[:, b], y, scale[:, b], out=y)
        rows = y.view(-1, channels)
        result = rows.new_empty(len(rows), outputs)
        if offset is None:
            torch.mm(rows, projection, out=result)
        else:
            torch.addmm(offset, rows, projection, out=result)
        out[:, b, t] = result.view(*x.shape[:-1], outputs)
    return out.view(count, *history.shape[1:-1], outputs)


def _tiles(samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Parts of at most ``most`` tokens, one at least: whole samples, or of a long one some of its tokens."""
    together = max(1, most // (tokens or 1))
    span = tokens if together > 1 else max(1, min(tokens, most))
    for sample in range(0, samples, together):
        for token in range(0, tokens, span or 1):
            yield slice(sample, sample + together), slice(token, token + span)
