"""``gram_row``: inner products of a new feature with the history, for a calibration."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.problem import COMPILED, COPY, OURS, REFERENCE, Problem, compiled, copier
from benchmarks.shapes import Shape
from lesa_kernels import gram_row
from lesa_kernels.ops.gram_row import reference

PROVIDERS = (OURS, REFERENCE, COMPILED, COPY)


def row(shape: Shape, device: str, backend: str = "auto") -> Problem:
    """One row of the matrix."""

    def make() -> tuple[Tensor, Tensor]:
        features = torch.randn(shape.kept + 1, *shape.feature, device=device).to(shape.dtype)
        return features[:-1], features[-1]

    def error(inputs: tuple[Any, ...], result: Tensor) -> float:
        history, feature = inputs
        exact = torch.stack([(h.double() * feature.double()).sum() for h in history])
        # random features are nearly orthogonal, so errors are relative to the norms, not to the inner products
        scale = torch.stack([h.double().norm() for h in history]).norm() * feature.double().norm()
        return float((result.double() - exact).norm() / scale)

    nbytes = (shape.kept + 1) * shape.nbytes
    return Problem(
        operation=f"gram_row of {shape.kept}",
        direction="forward",
        shape=shape.name,
        nbytes=nbytes,
        make=make,
        functions={
            OURS: lambda history, feature: gram_row(history, feature, backend=backend),
            REFERENCE: reference.gram_row,
            COMPILED: compiled(reference.gram_row),
            COPY: copier(nbytes, device),
        },
        error=error,
        dtype=torch.float32,
    )
