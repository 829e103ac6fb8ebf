"""``combine``: predictions from the history, for one step or for a whole interval."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
from lesa_kernels import combine
from lesa_kernels.ops.combine import reference

PROVIDERS = (OURS, REFERENCE, COMPILED, "released graph", COPY)


def predictions(shape: Shape, device: str, count: int, backend: str = "auto") -> Problem:
    """``count`` predictions from ``shape.kept`` features."""
    functions: dict[str, Callable[..., Any]] = {
        OURS: lambda history, coefficients, bias, _: combine(history, coefficients, bias, backend=backend),
        REFERENCE: lambda history, coefficients, bias, _: reference.combine(history, coefficients, bias),
        COMPILED: compiled(lambda history, coefficients, bias, _: reference.combine(history, coefficients, bias)),
        COPY: copier((shape.kept + count) * shape.nbytes, device),
    }
    if count == 1:
        functions["released graph"] = lambda history, _, __, graph: graph(history)

    def make() -> tuple[Any, ...]:
        history = torch.randn(shape.kept, *shape.feature, device=device).to(shape.dtype)
        coefficients = torch.randn(count, shape.kept, device=device)
        bias = torch.randn(count, device=device) / 10
        return history, coefficients, bias, released(coefficients[:1], bias[:1], shape.dtype)

    return Problem(
        operation=f"combine, {count} of {shape.kept}",
        direction="forward",
        shape=shape.name,
        nbytes=(shape.kept + count) * shape.nbytes,
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )


def gradients(shape: Shape, device: str, count: int) -> Problem:
    """Gradients of the history and the coefficients, as in training."""

    def backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def run(history: Tensor, coefficients: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (history, coefficients)]
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves, bias), leaves, grad)

        return run

    forward = predictions(shape, device, count)

    def make() -> tuple[Tensor, ...]:
        history, coefficients, bias, _ = forward.make()
        return history, coefficients, bias, torch.randn(count, *shape.feature, device=device).to(shape.dtype)

    def gradient_error(inputs: tuple[Any, ...], result: tuple[Tensor, ...]) -> float:
        history, coefficients, _, grad = inputs
        part = some(shape.tokens)
        exact = torch.einsum("pm,p...->m...", coefficients.double(), grad[:, :, part].double())
        sums = torch.stack([(grad[p].double() * history[j].double()).sum() for p in range(count) for j in range(2)])
        return max(relative_error(result[0][:, :, part], exact), relative_error(result[1][:, :2].reshape(-1), sums))

    return Problem(
        operation=f"combine, {count} of {shape.kept}",
        direction="backward",
        shape=shape.name,
        nbytes=2 * (shape.kept + count) * shape.nbytes,
        make=make,
        functions={OURS: backward(combine), REFERENCE: backward(reference.combine)},
        error=gradient_error,
        dtype=shape.dtype,
    )


def released(coefficients: Tensor, bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """LESA's released predictor for one step with a known gate: stack, linear, multiply, add.

    Weights and gate have the dtype of the features, as in the released code. The gate is 1, so the weights are those of
    ``combine``, minus the 1 with which the last feature is added.
    """
    m = coefficients.shape[1]
    latent = nn.Linear(m, 1, device=coefficients.device, dtype=dtype).requires_grad_(False)
    latent.weight.copy_(coefficients - torch.eye(m, device=coefficients.device)[-1])
    latent.bias.copy_(bias)
    gate = torch.ones((), device=coefficients.device, dtype=dtype)

    def run(history: Tensor) -> Tensor:
        z = latent(torch.stack(list(history), dim=-1)).squeeze(-1)
        return (history[-1] + gate * z).unsqueeze(0)

    return run


def error(inputs: tuple[Any, ...], result: Tensor) -> float:
    history, coefficients, bias, _ = inputs
    part = some(history.shape[2])
    exact = torch.einsum("pm,m...->p...", coefficients.double(), history[:, :, part].double())
    exact += bias.double()[:, None, None, None]
    return relative_error(result[:, :, part], exact)
