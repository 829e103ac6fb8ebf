"""KAN layers, forward and backward: time, memory that is kept for the backward pass, error."""

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu.part import Part, Row
from benchmarks.gpu.rows import measure_problem
from benchmarks.memory import kept_for_backward
from benchmarks.problems import kan_linear
from benchmarks.problems.kan_linear import LAYERS, Layer
from benchmarks.problems.problem import COMPILED

LARGE = Layer("256 to 256, many rows, bf16", 65536, 256, 256, torch.bfloat16)
LARGE_FLOAT32 = Layer("256 to 256, many rows", 65536, 256, 256)
ORDER = (LARGE, LARGE_FLOAT32, LAYERS["256 to 256"], LAYERS["256 to 256, bf16"], LAYERS["gate of one step"])
COMPARED = (LARGE, LARGE_FLOAT32)  # with the compiled reference; each takes seconds to compile


def measure(part: Part) -> None:
    layers = [kan_linear.SMOKE] if part.smoke else list(ORDER)
    for layer in tqdm(layers, desc="KAN layers", delay=2):
        for direction in ("forward", "backward"):
            if part.left < 3 and not part.smoke:
                part.skip(f"KAN layer {layer.name}, {direction}: no time left")
                continue
            measure_problem(
                part,
                lambda backend, s=layer, d=direction: kan_linear.layer(s, part.device, d, backend),  # type: ignore[misc]
                without=() if layer in COMPARED else (COMPILED,),
                extra=_kept if direction == "forward" else None,
            )


def _kept(problem: Any, provider: str) -> Row:
    """Bytes that the forward pass keeps for the backward pass; compiled code saves tensors past the hooks."""
    if provider == COMPILED:
        return {}
    inputs = [tensor.requires_grad_() for tensor in problem.make()]
    return {"kept_bytes": kept_for_backward(lambda: problem.functions[provider](*inputs), inputs)}
