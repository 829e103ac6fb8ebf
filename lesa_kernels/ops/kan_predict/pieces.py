"""``kan_predict`` without a kernel: the reference on one piece of the tokens after the other.

The reference keeps the bases of a window: 10 float32 numbers for every feature in it, and a few times that while they
are computed. For the whole history that is many times its size; for a piece it stays in the cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

PIECE = 16_384  # elements of a feature
GRADIENT_PIECE = 2**18  # autograd keeps 3.9 kB for an element with K = 8 and P = 6: 1 GB


def kan_predict(history: Tensor, gates: Tensor, *weights: Any, order: int, grid_range: tuple[float, float]) -> Tensor:
    """Arguments and result of the reference."""
    feature = history.shape[1:]
    out = history.new_empty(len(gates), *feature)
    if out.numel() == 0:
        return out
    tokens = history.reshape(len(history), -1, feature[-1])
    results = out.view(len(gates), -1, feature[-1])
    for piece in pieces(tokens, PIECE):
        results[:, piece] = reference.kan_predict(tokens[:, piece], gates, *weights, order=order, grid_range=grid_range)
    return out


def pieces(tokens: Tensor, elements: int) -> Iterator[slice]:
    """Cuts tokens [K, n, D] along n into pieces of about that many elements a feature."""
    _, n, channels = tokens.shape
    size = max(1, elements // channels)
    return (slice(start, start + size) for start in range(0, n, size))


def gradients(
    grad: Tensor,
    tensors: Sequence[Any],
    wanted: Sequence[bool],
    order: int,
    grid_range: tuple[float, float],
) -> list[Tensor | None]:
    """Gradients of the reference's seven tensors, None where not wanted, from that of its result [P, *feature].

    They can be differentiated again. Sums over tokens are in float32 (float64) for any dtype of the weights.
    """
    if grad.numel() == 0:
        return [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
    history, *others = tensors
    exact = torch.promote_types(history.dtype, torch.float32)
    weights = [t if t is None else t.to(exact) for t in others]
    channels = history.shape[-1]
    tokens, upstream = (t.reshape(len(t), -1, channels) for t in (history, grad))
    by_tokens = []
    totals: list[Any] = [0] * len(weights)
    # in one piece for a compiler, which fuses it
    for piece in pieces(tokens, tokens.numel() if torch.compiler.is_compiling() else GRADIENT_PIECE):
        arguments = tokens[:, piece], *weights
        by_piece, *found = _gradients(upstream[:, piece], arguments, wanted, order, grid_range)
        by_tokens.append(by_piece)
        totals = [more if more is None else total + more for total, more in zip(totals, found, strict=True)]
    return [
        torch.cat(by_tokens, 1).view(history.shape) if wanted[0] else None,
        *(total if total is None else total.to(t.dtype) for total, t in zip(totals, others, strict=True)),
    ]


def _gradients(
    grad: Tensor, arguments: Sequence[Any], wanted: Sequence[bool], order: int, grid_range: tuple[float, float]
) -> list[Any]:
    def predict(*sources: Tensor) -> Tensor:
        given = iter(sources)
        tensors = [next(given) if w else t for t, w in zip(arguments, wanted, strict=True)]
        return reference.kan_predict(*tensors, order=order, grid_range=grid_range)

    pull = torch.func.vjp(predict, *(t for t, w in zip(arguments, wanted, strict=True) if w))[1]
    found = iter(pull(grad))
    return [next(found) if w else None for w in wanted]
