"""``kan_linear``: a KAN layer, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems.problem import COMPILED, LINEAR, OURS, REFERENCE, Problem, compiled, relative_error
from lesa_kernels import kan_linear
from lesa_kernels.ops.kan_linear import reference

ORDER, BASES, RANGE = 3, 8, (-3.0, 3.0)
PROVIDERS = (OURS, REFERENCE, COMPILED, "inkan", LINEAR)


@dataclass(frozen=True)
class Layer:
    """The number of rows of x, and the numbers of inputs and outputs of the layer."""

    name: str
    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.float32


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("gate of one step", 1, 51, 256),
        Layer("gates of a generation", 50, 256, 256),
        Layer("256 to 256", 4096, 256, 256),
        Layer("256 to 256, bf16", 4096, 256, 256, torch.bfloat16),
        Layer("784 to 64", 1024, 784, 64),
    )
}
SMOKE = Layer("smoke", 8, 16, 16)


def layer(shape: Layer, device: str, direction: str = "forward", backend: str = "auto") -> Problem:
    """The layer's output, or the gradients of x and both weights."""
    functions: dict[str, Callable[..., Any]] = {
        OURS: lambda x, base, spline, _: kan_linear(x, base, spline, backend=backend),
        REFERENCE: plain,
        COMPILED: compiled(plain),
        LINEAR: lambda x, base, *_: F.linear(x, base),
    }
    if find_spec("inkan") and shape.dtype == torch.float32:
        functions["inkan"] = _inkan(shape, device)
    if direction == "backward":
        functions = {name: _backward(function) for name, function in functions.items()}

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(shape.rows, shape.inputs, device=device)
        base = torch.randn(shape.outputs, shape.inputs, device=device) / shape.inputs**0.5
        spline = torch.randn(shape.outputs, shape.inputs, BASES, device=device) / shape.inputs**0.5
        packed = torch.cat([spline.flatten(1), base], dim=1)  # both weights in inkan's layout
        grad = [torch.randn(shape.rows, shape.outputs, device=device)] if direction == "backward" else []
        return tuple(t.to(shape.dtype) for t in (x, base, spline, packed, *grad))

    def error(inputs: tuple[Any, ...], result: Any) -> float:
        exact = (_backward(plain) if direction == "backward" else plain)(*(t.double() for t in inputs))
        if direction == "forward":
            return relative_error(result, exact)
        gradients = zip(_unpacked(result), _unpacked(exact), strict=True)
        return max(relative_error(got, want) for got, want in gradients)

    sizes = shape.rows * (shape.inputs + shape.outputs), shape.outputs * shape.inputs * (BASES + 1)
    return Problem(
        operation="kan_linear",
        direction=direction,
        shape=f"{shape.name} [{shape.rows}, {shape.inputs}] to {shape.outputs}",
        nbytes=sum(sizes) * shape.dtype.itemsize * (2 if direction == "backward" else 1),
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )


def plain(x: Tensor, base: Tensor, spline: Tensor, _: Tensor) -> Tensor:
    return reference.kan_linear(x, base, spline, order=ORDER, grid_range=RANGE)


def _backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Forward pass, and gradients of x and of the weights that the function uses."""

    def run(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, grad = inputs
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    return run


def _unpacked(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of all weights in inkan's layout."""
    x, base, spline, packed = gradients
    assert x is not None
    if packed is None:
        assert base is not None
        assert spline is not None
        packed = torch.cat([spline.flatten(1), base], dim=1)
    return x, packed


def _inkan(shape: Layer, device: str) -> Callable[..., Tensor]:
    """inkan's layer, with the same weights."""
    from inkan import KANLayer

    module = KANLayer(shape.inputs, shape.outputs, grid_size=BASES - ORDER, grid_range=RANGE).to(device)

    def run(x: Tensor, _: Tensor, __: Tensor, packed: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, {"weight": packed}, (x,))
        return result

    return run
