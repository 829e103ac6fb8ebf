"""``fused_output_head``: the outputs of a transformer at all predicted steps of an interval."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems.problem import (
    COMPILED,
    COPY,
    OURS,
    REFERENCE,
    Problem,
    compiled,
    copier,
    relative_error,
    some,
)
from benchmarks.shapes import Shape
from lesa_kernels import combine, fused_output_head, token_means
from lesa_kernels.ops.fused_output_head import reference

PROVIDERS = (OURS, REFERENCE, COMPILED, "combine, then modules", COPY)
EPS = 1e-6


def outputs(shape: Shape, device: str, backend: str = "auto") -> Problem:
    """The outputs of ``shape.coming`` predicted steps from ``shape.kept`` features."""
    count = shape.coming
    nbytes = shape.kept * shape.nbytes + count * shape.nbytes // shape.channels * shape.outputs

    def ours(history: Tensor, c: Tensor, multiplier: Tensor, addend: Tensor, weight: Tensor, means: Tensor) -> Tensor:
        return fused_output_head(history, c, None, multiplier, addend, weight, eps=EPS, means=means, backend=backend)

    def plain(history: Tensor, c: Tensor, multiplier: Tensor, addend: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        return reference.fused_output_head(history, c, None, multiplier, addend, weight, None, EPS)

    functions: dict[str, Callable[..., Any]] = {
        OURS: ours,
        REFERENCE: plain,
        COMPILED: compiled(plain),
        "combine, then modules": modules,
        COPY: copier(nbytes, device),
    }

    def make() -> tuple[Tensor, ...]:
        history = torch.randn(shape.kept, *shape.feature, device=device).to(shape.dtype)
        modulation = torch.randn(2, count, 1, shape.channels, device=device) / 4
        weight = torch.randn(shape.outputs, shape.channels, device=device) / shape.channels**0.5
        coefficients = torch.randn(count, shape.kept, device=device)
        return history, coefficients, 1 + modulation[0], modulation[1], weight.to(shape.dtype), token_means(history)

    def error(inputs: tuple[Any, ...], result: Tensor) -> float:
        part = some(shape.tokens)
        history, *others, means = inputs
        exact = plain(history[:, :, part].double(), *(t.double() for t in others), means)
        return relative_error(result[:, :, part], exact)

    return Problem(
        operation=f"head, {count} of {shape.kept}",
        direction="forward",
        shape=shape.name,
        nbytes=nbytes,
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )


def modules(history: Tensor, c: Tensor, multiplier: Tensor, addend: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """Norm, modulation and projection of one prediction after the other, in the dtype of the model."""
    results = []
    for p in range(len(c)):
        x = F.layer_norm(combine(history, c[p : p + 1])[0], (history.shape[-1],), eps=EPS)
        scale, shift = multiplier[p].unsqueeze(1).to(x.dtype), addend[p].unsqueeze(1).to(x.dtype)
        results.append(F.linear(x * scale + shift, weight))
    return torch.stack(results)
