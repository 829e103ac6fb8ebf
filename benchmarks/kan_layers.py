"""KAN layers of several libraries on a CPU: times of a forward pass and a training step, and bytes kept for backward.

    python -m benchmarks.kan_layers --out benchmarks/results/kan_layers.json

All layers get the same float32 weights and inputs. Before anything is timed, output and input gradient of layers that
compute the same function are compared. Layers run in turns in one process; a ratio is the median over rounds of another
layer's time to ours in the same round. nn.Linear computes another function and is a lower limit of the cost. pykan
makes tensors [rows, in, out], so it is measured only where these are small.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inkan import KANLayer as InKAN
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memory import kept_for_backward
from benchmarks.peers.efficient_kan import EfficientKANLinear
from lesa.reports.environment import describe_environment
from lesa_kernels import KANLinear

RANGE, ORDER = (-3.0, 3.0), 3
OURS = "KANLinear"
# rows, in, out, grid size: rounds
SHAPES = {
    (1, 64, 64, 5): 301,
    (256, 64, 64, 5): 101,
    (512, 784, 64, 5): 15,
    (4096, 256, 256, 5): 9,
    (4096, 64, 64, 50): 7,
}
PYKAN_NUMBERS = 1 << 21


@dataclass
class Layer:
    """A layer to compare: its name, its module, and how it is called."""

    name: str
    same_function: bool
    module: nn.Module
    call: Callable[[Tensor], Tensor]


def layers(rows: int, in_features: int, out_features: int, grid_size: int, compiled: bool = True) -> list[Layer]:
    """Ours first; all except nn.Linear have the same weights. ``compiled``: include those that need a compiler."""
    ours = KANLinear(in_features, out_features, grid_size, ORDER, grid_range=RANGE)
    with torch.no_grad():
        ours.spline_weight.normal_(std=in_features**-0.5)
    efficient = EfficientKANLinear(in_features, out_features, grid_size, ORDER, RANGE)
    efficient.load_state_dict(ours.state_dict())
    made = [Layer(OURS, True, ours, ours), Layer("efficient-kan's formulation", True, efficient, efficient)]
    packed = torch.cat([ours.scaled_spline_weight.flatten(1), ours.base_weight], 1).detach()
    inkan, eager = (
        InKAN(in_features, out_features, grid_size, grid_range=RANGE, compile_basis=option) for option in (True, False)
    )
    for layer in (inkan, eager):
        layer.load_state_dict({"weight": packed}, strict=False)
    if compiled:
        torch._dynamo.reset()  # compile each shape separately, as in a program with only one
        made.append(Layer("the same, torch.compile", True, efficient, torch.compile(efficient)))
        made.append(Layer("inkan", True, inkan, inkan))
    made.append(Layer("inkan, compile_basis=False", True, eager, eager))
    if rows * in_features * out_features <= PYKAN_NUMBERS:
        pykan = pykan_layer(ours)
        made.append(Layer("pykan KANLayer", True, pykan, lambda x: pykan(x)[0]))
    linear = nn.Linear(in_features, out_features, bias=False)
    return [*made, Layer("nn.Linear", False, linear, linear)]


def pykan_layer(ours: KANLinear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pykan's source has invalid escape sequences
        from kan.KANLayer import KANLayer
    layer = KANLayer(ours.in_features, ours.out_features, num=ours.grid_size, k=ORDER, grid_range=list(RANGE))
    with torch.no_grad():
        layer.coef.copy_(ours.spline_weight.transpose(0, 1))
        layer.scale_sp.copy_(ours.spline_scaler.T)
        layer.scale_base.copy_(ours.base_weight.T)
    return layer


def assert_same_function(made: list[Layer], x: Tensor) -> None:
    def value_and_gradient(layer: Layer) -> tuple[Tensor, Tensor]:
        at = x.clone().requires_grad_()
        y = layer.call(at)
        return y.detach(), torch.autograd.grad(y.square().sum(), at)[0]

    ours = value_and_gradient(made[0])
    for layer in made[1:]:
        if layer.same_function:
            for a, b in zip(ours, value_and_gradient(layer), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item(), msg=layer.name)


def kept_bytes(layer: Layer, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters, buffers and the input."""
    return kept_for_backward(lambda: layer.call(x), (x, *layer.module.parameters(), *layer.module.buffers()))


def milliseconds(layer: Layer, x: Tensor, training: bool) -> float:
    start = time.perf_counter()
    if training:
        at = x.detach().requires_grad_()
        layer.call(at).sum().backward()
    else:
        with torch.no_grad():
            layer.call(x)
    elapsed = time.perf_counter() - start
    layer.module.zero_grad()
    return elapsed * 1e3


def measure(rows: int, in_features: int, out_features: int, grid_size: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each layer."""
    torch.manual_seed(0)
    x = torch.randn(rows, in_features) * 1.5
    made = layers(rows, in_features, out_features, grid_size)
    assert_same_function(made, x)
    times: dict[tuple[str, bool], list[float]] = {(layer.name, t): [] for layer in made for t in (False, True)}
    title = f"{rows} x {in_features} -> {out_features}"
    for number in tqdm(range(rounds + 2), desc=title, delay=2):
        for training in (False, True):
            for layer in made:
                elapsed = milliseconds(layer, x, training)
                if number > 1:  # the first rounds warm up
                    times[layer.name, training].append(elapsed)

    def ratio(name: str, training: bool) -> float:
        pairs = zip(times[name, training], times[OURS, training], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    return [
        {
            "layer": layer.name,
            "same_function": layer.same_function,
            "rows": rows,
            "in_features": in_features,
            "out_features": out_features,
            "grid_size": grid_size,
            "forward_ms": statistics.median(times[layer.name, False]),
            "training_ms": statistics.median(times[layer.name, True]),
            "forward_to_ours": ratio(layer.name, False),
            "training_to_ours": ratio(layer.name, True),
            "kept_bytes": kept_bytes(layer, x.clone().requires_grad_()),
            "rounds": rounds,
        }
        for layer in made
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environment = describe_environment(["torch", "inkan", "pykan"])
    rows = [row | {"environment": environment} for shape, rounds in SHAPES.items() for row in measure(*shape, rounds)]
    for row in rows:
        print(
            f"{row['rows']:5d} x {row['in_features']:3d} -> {row['out_features']:3d}, {row['grid_size']:2d}  "
            f"{row['layer']:28s} forward {row['forward_ms']:9.3f} ms {row['forward_to_ours']:6.2f}x  "
            f"training {row['training_ms']:9.3f} ms {row['training_to_ours']:6.2f}x  "
            f"kept {row['kept_bytes'] / 1e6:8.2f} MB"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
