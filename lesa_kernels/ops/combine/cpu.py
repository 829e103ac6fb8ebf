"""``combine`` and its relatives on a CPU, for coefficients that are shared or per channel.

The reference makes a pass and a temporary for every term. Here each feature is read once, by matrix products of tiles
that stay in the cache. bf16 and fp16 tiles are converted to float32, since rounding the coefficients instead would
increase the error ten times. Per channel there is no matrix product: terms are added one by one to sums in the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

# A tile is TILES x m x COLUMNS. Threads share it in the same way for conversion and product, so each finds its part in
# its own cache. [8, 1, 1024, 3072] with a bias on 2 cores: bf16 in 7.6 ms, 10 ms with tiles of half the size. float32
# needs no conversion, so its tiles are larger: 5.9 ms, 7.0 ms with as many tiles as bf16, 8.6 ms as one product.
TILES, COLUMNS = 16, 8192
UNCONVERTED_TILES = 48
CHANNEL_CHUNK = 1 << 17  # elements of all sums of a chunk, in float32 512 KB
DOT_CHUNK = 1 << 14  # elements; in float64, since a float32 product of this length is off by 1e-6 of its norms


def combine(history: Tensor, coefficients: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """history [m, *feature], coefficients [P, m], bias [P] -> [P, *feature], contiguous; in ``out`` if it is given.

    Or coefficients [P, m, 1, ..., D] and bias [P, 1, ..., D] of features [*tokens, D].
    """
    if coefficients.ndim > 2:
        out = history.new_empty(len(coefficients), *history.shape[1:]) if out is None else out
        return _combine_channels(history, coefficients, bias, out)
    exact = torch.promote_types(history.dtype, torch.float32)
    rows, weights, shift = history.flatten(1), coefficients.to(exact), None if bias is None else bias.to(exact)
    if out is None:
        out = history.new_empty(len(weights), *history.shape[1:])
    results = out.flatten(1)
    if history.dtype == exact and rows.shape[1] < UNCONVERTED_TILES * COLUMNS:
        # functions with out= are left alone by autocast, which would round the coefficients
        if shift is None:
            torch.mm(weights, rows, out=results)
        else:
            torch.addmm(shift[:, None], weights, rows, out=results)
    else:
        _combine_tiles(results, rows, weights, shift)
    return out


def gradients(grad: Tensor, history: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of coefficients, [P, m, *channels], and bias, [P, *channels], from grad [P, *feature]."""
    if channels:
        return reference.gradients(grad, history, tuple(channels))
    return _dots(grad.flatten(1), history.flatten(1)), grad.flatten(1).sum(1, dtype=torch.float64)


def gram_row(history: Tensor, feature: Tensor) -> Tensor:
    """history [m, *feature], feature [*feature] -> float64 [m]."""
    return _dots(feature.reshape(1, -1), history.flatten(1))[0]


def _combine_channels(history: Tensor, coefficients: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    exact, channels = torch.promote_types(history.dtype, torch.float32), history.shape[-1]
    count, m = coefficients.shape[:2]
    rows, results = history.view(m, -1, channels), out.view(count, -1, channels)
    weights = coefficients.to(exact).view(count, m, 1, channels)
    shift = weights.new_zeros(()) if bias is None else bias.to(exact).view(count, 1, channels)
    step = max(1, CHANNEL_CHUNK // (count * channels))
    for source, target in zip(rows.split(step, 1), results.split(step, 1), strict=True):
        total = target if target.dtype == exact else target.new_empty(target.shape, dtype=exact)
        torch.addcmul(shift, weights[:, 0], source[0].to(exact), out=total)
        for j in range(1, m):
            total.addcmul_(weights[:, j], source[j].to(exact))
        if total is not target:
            target.copy_(total)
    return out


def _combine_tiles(out: Tensor, rows: Tensor, weights: Tensor, shift: Tensor | None) -> None:
    (count, m), size = weights.shape, rows.shape[1]
    widened = rows.dtype != weights.dtype
    most = TILES if widened else UNCONVERTED_TILES
    step = min(size, most * COLUMNS)
    wide, sums = (weights.new_empty(n * step if widened else 0) for n in (m, count))
    for start in range(0, size, step or 1):
        span = min(step, size - start)
        tiles = most if span == most * COLUMNS else 1
        columns = span // tiles
        source, target = (
            t[:, start : start + span].unflatten(1, (tiles, columns)).transpose(0, 1) for t in (rows, out)
        )
        tile, total = source, target
        if widened:
            tile, total = (t[: tiles * n * columns].view(tiles, n, columns) for t, n in ((wide, m), (sums, count)))
            tile.copy_(source)
        if shift is None:
            torch.bmm(weights.expand(tiles, -1, -1), tile, out=total)
        else:
            torch.baddbmm(shift[:, None].expand(tiles, -1, columns), weights.expand(tiles, -1, -1), tile, out=total)
        if widened:
            target.copy_(total)


def _dots(left: Tensor, rows: Tensor) -> Tensor:
    """left [P, n], rows [m, n] -> their inner products, float64 [P, m]."""
    total = rows.new_zeros(len(left), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], DOT_CHUNK):
        part = slice(start, start + DOT_CHUNK)
        total.addmm_(left[:, part].double(), rows[:, part].double().T)
    return total
