"""Ratios of our functions' times to those of their references, measured in turns in one process.

Other work on the machine slows both sides down, so the ratio is more stable than the times. On a CPU one thread is
used, since waiting for other threads depends on other work, too.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.clocks import make_clock, one_round
from benchmarks.problems import combine, gram, head, interval, kan_linear, kan_predict, taylor
from benchmarks.problems.problem import OURS, REFERENCE, Problem
from benchmarks.shapes import SHAPES, Shape

SECONDS = 2.0  # for each ratio
LEAST_ROUNDS = 15
ROUND = 0.01  # least seconds of each side in a round
SETS = 3  # number of inputs, used in turn: their location in memory can change the time by 10 %


@dataclass(frozen=True)
class Ratio:
    """Our time over the reference's: the median of the rounds, and half the quartile distance relative to it."""

    value: float
    spread: float
    rounds: int


def problems(device: str) -> dict[str, Callable[[], tuple[Problem, str]]]:
    """By name, a function that makes the problem and names the provider to compare with."""
    flux, demo = SHAPES["FLUX.1-dev 1024"], SHAPES["demo"]
    bf16 = flux if device == "cuda" else flux.within(8 * 2**20)
    fp32 = replace(bf16, dtype=torch.float32, name=f"{bf16.name}, fp32")
    few = bf16 if device == "cuda" else bf16.within(2**20)
    tiny = replace(flux, name="128 tokens of 256 channels", tokens=128, channels=256)

    def against_reference(make: Callable[..., Problem], *arguments: object) -> Callable[[], tuple[Problem, str]]:
        return lambda: (make(*arguments), REFERENCE)

    def named(shape: Shape, text: str) -> str:
        return f"{text}, {str(shape.dtype).removeprefix('torch.')}"

    made = {
        named(bf16, "combine, one prediction"): against_reference(combine.predictions, bf16, device, 1),
        named(fp32, "combine, one prediction"): against_reference(combine.predictions, fp32, device, 1),
        named(bf16, "combine, an interval"): against_reference(combine.predictions, bf16, device, bf16.coming),
        named(fp32, "combine, an interval"): against_reference(combine.predictions, fp32, device, bf16.coming),
        named(bf16, "combine, gradients"): against_reference(combine.gradients, few, device, bf16.coming),
        named(bf16, "Taylor 2"): against_reference(taylor.taylor, bf16, device),
        named(bf16, "gram_row"): against_reference(gram.row, bf16, device),
        named(bf16, "head"): against_reference(head.outputs, bf16, device),
        named(demo, "head, demo"): against_reference(head.outputs, demo, device),
        named(few, "kan_predict"): against_reference(kan_predict.predictions, tiny, device, 1),
        named(bf16, "an interval"): lambda: (interval.interval(few, device), interval.CLOSED_LOOP),
        named(bf16, "a predicted step"): lambda: (interval.predicted_step(few, device), interval.CLOSED_LOOP),
    }
    for direction in ("forward", "backward"):
        layer = kan_linear.LAYERS["256 to 256"]
        layer = layer if device == "cuda" else replace(layer, rows=512)
        made[f"kan_linear, {direction}, float32"] = against_reference(kan_linear.layer, layer, device, direction)
    return made


def measure(problem: Problem, other: str, device: str, *, seconds: float = SECONDS) -> Ratio:
    """The ratio of our time to another provider's; both results are checked first."""
    with torch.inference_mode(problem.direction == "forward"):
        calls = [problem.ready(name, sets=SETS)[0] for name in (OURS, other)]
        sides = []
        for call in calls:
            clock, iterations, estimate = make_clock(call, "device", device)
            sides.append((call, clock, max(1, min(iterations, int(ROUND / estimate))), estimate))
        rounds = max(LEAST_ROUNDS, int(seconds / sum(n * estimate for _, _, n, estimate in sides)))
        ratios = []
        for _ in range(rounds):
            ours, theirs = (one_round(call, clock, n) for call, clock, n, _ in sides)
            ratios.append(ours / theirs)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, (high - low) / 2 / middle, rounds)
