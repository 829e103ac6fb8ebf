"""``kan_predict``: LESA with a KAN on the features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
from lesa_kernels import kan_predict
from lesa_kernels.ops.kan_predict import reference

STAGES, ORDER, BASES, RANGE = 3, 3, 8, (-3.0, 3.0)
PROVIDERS = (OURS, REFERENCE, COMPILED, COPY)


def predictions(shape: Shape, device: str, count: int, backend: str = "auto") -> Problem:
    """``count`` predictions; each is in the window of the next one."""

    def plain(*inputs: Tensor) -> Tensor:
        return reference.kan_predict(*inputs, order=ORDER, grid_range=RANGE)

    functions: dict[str, Callable[..., Any]] = {
        OURS: lambda *inputs: kan_predict(*inputs[:6], scale=inputs[6], backend=backend),
        REFERENCE: plain,
        COMPILED: compiled(plain),
        COPY: copier((shape.kept + count) * shape.nbytes, device),
    }

    def make() -> tuple[Tensor, ...]:
        k = shape.kept
        history = torch.randn(k, *shape.feature, device=device).to(shape.dtype)
        gates = torch.randn(count, STAGES, device=device)
        weights = [torch.randn(STAGES, k, *rest, device=device) / (4 * k) for rest in ((), (), (BASES,))]
        return (
            history,
            gates,
            *weights,
            torch.randn(STAGES, device=device) / 10,
            1 + torch.rand(shape.channels, device=device),
        )

    def error(inputs: tuple[Any, ...], result: Tensor) -> float:
        part = some(shape.tokens)
        exact = plain(inputs[0][:, :, part].double(), *(t.double() for t in inputs[1:]))
        return relative_error(result[:, :, part], exact)

    return Problem(
        operation=f"kan_predict, {count} of {shape.kept}",
        direction="forward",
        shape=shape.name,
        nbytes=(shape.kept + count) * shape.nbytes,
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )
