"""The effect of each optimisation, from the released predictor to one pass over the history.

    python -m benchmarks.optimisations --out benchmarks/results/optimisations.json

All stages compute the same outputs: the six predicted steps after the full step 23, by LESA's predictor on the paper's
plan for N = 7. They run in turns in one process; times are medians over the rounds. ``docs/performance.md`` derives the
bytes that each has to move.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.census import census
from benchmarks.clocks import WallClock, one_round
from benchmarks.memory import keep_freed_memory
from benchmarks.problems import interval
from benchmarks.problems.problem import OURS
from benchmarks.shapes import SHAPES, Shape
from lesa.reports.environment import describe_environment

ROUNDS = 9
STAGES = (interval.CLOSED_LOOP, interval.KNOWN_GATES, interval.STEP_BY_STEP, interval.ONE_PASS, OURS)


def stages(shape: Shape, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each implementation of the same outputs."""
    problem = interval.interval(shape, "cpu")
    calls = {name: problem.ready(name) for name in STAGES}
    clock = WallClock("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    for number in tqdm(range(rounds + 1), desc=shape.name, delay=2):
        for name, (call, _) in calls.items():
            elapsed = one_round(call, clock, 1)
            if number > 0:  # the first round warms up
                seconds[name].append(elapsed)
    first = seconds[STAGES[0]]
    counted = {name: census(call) for name, (call, _) in calls.items()}
    return [
        {
            "shape": shape.name,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "way": name,
            "seconds": statistics.median(seconds[name]),
            "speedup": statistics.median(a / b for a, b in zip(first, seconds[name], strict=True)),
            "operators": counted[name].operators,
            "allocated": counted[name].allocated,
            "error": calls[name][1],
            "rounds": rounds,
        }
        for name in STAGES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    shapes = [SHAPES["FLUX.1-dev 1024"].within(32 * 2**20), SHAPES["DiT-XL/2 256"], SHAPES["demo"]]
    with torch.inference_mode():
        rows = [row for shape in shapes for row in stages(shape)]
    for row in rows:
        print(f"{row['shape']:32s} {row['way']:28s} {row['seconds'] * 1e3:8.2f} ms  {row['speedup']:6.1f}x")
    if options.out is not None:
        result = {"environment": describe_environment(["torch", "numpy"]), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
