"""Growth of the cost with tokens, steps, kept features and batch: ``python -m benchmarks.scaling --out ...``.

Each curve varies one size and keeps the others. Its exponent is the slope of a straight line through the larger half of
the points on logarithmic axes, where the constant cost of a call is small. One thread. Features have 64 channels only,
so that a million tokens take 128 MB in bf16; the cost of a combination depends on tokens times channels only.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lesa
from benchmarks.clocks import measure
from benchmarks.memory import keep_freed_memory
from lesa import GramMatrix, LeastSquares, LesaConfig, LesaPredictor, StepPlan, Taylor
from lesa.reports.environment import describe_environment
from lesa_kernels import combine, fused_output_head, gram_row

CHANNELS, OUTPUTS, KEPT, COMING = 64, 16, 8, 6
SECONDS = 0.3  # for each point


@dataclass(frozen=True)
class Curve:
    """``make(size)`` returns the call to time."""

    what: str
    over: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], Any]]


def features(kept: int, tokens: int, batch: int = 1) -> Tensor:
    """[kept, batch, tokens, channels]: repeated random numbers, since times do not depend on values."""
    row = torch.randn(4096).bfloat16()
    return row.repeat(-(-kept * batch * tokens * CHANNELS // 4096))[: kept * batch * tokens * CHANNELS].view(
        kept, batch, tokens, CHANNELS
    )


def one_prediction(tokens: int = 1 << 14, kept: int = KEPT, batch: int = 1) -> Callable[[], Any]:
    history, coefficients = features(kept, tokens, batch), torch.randn(1, kept)
    return lambda: combine(history, coefficients)


def an_interval(tokens: int = 1 << 14, kept: int = KEPT, batch: int = 1) -> Callable[[], Any]:
    history, coefficients = features(kept, tokens, batch), torch.randn(COMING, kept)
    modulation, weight = torch.randn(2, COMING, batch, CHANNELS), torch.randn(OUTPUTS, CHANNELS).bfloat16()
    return lambda: fused_output_head(history, coefficients, None, *modulation, weight)


def a_gram_row(tokens: int = 1 << 14, kept: int = KEPT) -> Callable[[], Any]:
    history = features(kept, tokens)
    return lambda: gram_row(history, history[0])


def a_table(forecaster: Callable[[int], Any]) -> Callable[[int], Callable[[], Any]]:
    """The table of a generation with this number of steps, a fifth of them full."""

    def make(steps: int) -> Callable[[], Any]:
        made, times = forecaster(steps), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        plan = StepPlan(steps, range(0, steps, 5))
        return lambda: made.table(plan, times)

    return make


def least_squares(steps: int) -> LeastSquares:
    gram = GramMatrix(steps)
    walk = torch.randn(steps, 4 * steps, dtype=torch.float64).cumsum(0)
    for step, feature in enumerate(walk):
        gram.update(step, feature)
    return LeastSquares(gram)


class EmptyTransformer(nn.Module):
    """A transformer that computes nothing, so that a loop around it measures the cost of the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(2))
        self.norm_out = nn.Identity()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        result: Tensor = self.norm_out(hidden_states)
        return result


def a_runtime(steps: int) -> Callable[[], Any]:
    """A generation with a transformer that computes nothing: the cost of hooks and decisions."""
    transformer, feature = EmptyTransformer(), torch.randn(1, 16, 16)
    times = torch.linspace(1, 0, steps + 1)
    lesa.enable(transformer, Taylor(1), StepPlan(steps, range(0, steps, 5)), times=times)

    def generate() -> None:
        with torch.no_grad():
            for t in times[:-1]:
                transformer(hidden_states=feature, timestep=t.reshape(1) * 1000)

    return generate


TOKENS = tuple(1 << power for power in range(10, 21, 2))
STEPS, MANY, BATCHES = (25, 50, 100, 200, 400), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64)
CURVES = (
    Curve("one prediction", "tokens", TOKENS, lambda n: one_prediction(tokens=n)),
    Curve("outputs of an interval", "tokens", TOKENS, lambda n: an_interval(tokens=n)),
    Curve("row of a Gram matrix", "tokens", TOKENS, lambda n: a_gram_row(tokens=n)),
    Curve("one prediction", "kept features", MANY, lambda n: one_prediction(kept=n)),
    Curve("outputs of an interval", "kept features", MANY, lambda n: an_interval(kept=n)),
    Curve("row of a Gram matrix", "kept features", MANY, lambda n: a_gram_row(kept=n)),
    Curve("one prediction", "batch", BATCHES, lambda n: one_prediction(tokens=1 << 10, batch=n)),
    Curve("outputs of an interval", "batch", BATCHES, lambda n: an_interval(tokens=1 << 10, batch=n)),
    Curve("table of Taylor 2", "steps", STEPS, a_table(lambda steps: Taylor(2))),
    Curve("table of least squares", "steps", STEPS, a_table(least_squares)),
    Curve("table of LESA", "steps", STEPS, a_table(lambda steps: LesaPredictor(LesaConfig(steps, hidden_dim=64)))),
    Curve("runtime of a generation", "steps", STEPS, a_runtime),
)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The exponent of a power law through the larger half of the points."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    x, y = ([math.log(v) for v in given[half:]] for given in (sizes, values))
    return float(np.polyfit(x, y, 1)[0])


def points(curves: tuple[Curve, ...], most: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each curve, with its first ``most`` sizes."""
    total = sum(len(curve.sizes[:most]) for curve in curves)
    with tqdm(total=total, desc="scaling", delay=2) as bar:
        for curve in curves:
            sizes, seconds = list(curve.sizes[:most]), []
            for size in sizes:
                seconds.append(measure(curve.make(size), "wall", "cpu", budget=SECONDS).median)
                bar.update()
            yield {
                "what": curve.what,
                "over": curve.over,
                "sizes": sizes,
                "seconds": seconds,
                "exponent": exponent(sizes, seconds),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    result = {"environment": describe_environment(["torch", "numpy"]), "curves": list(points(CURVES))}
    for over, curves in itertools.groupby(result["curves"], key=lambda row: row["over"]):
        for row in curves:
            print(f"{row['what']:24s} over {over:14s} exponent {row['exponent']:.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
