"""Numbers that are equal in every run: operators, bytes, launches, and properties of the machine code."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.census import census, counted_launches
from benchmarks.problems import combine, gram, head, kan_linear, kan_predict
from benchmarks.problems.problem import OURS, Problem
from benchmarks.ratios import problems
from benchmarks.shapes import SMOKE

ROOT = Path(__file__).parents[1]
OPERATIONS = ("combine", "fused_output_head", "kan_linear", "kan_predict")
CAPABILITY = 90


def counts(device: str) -> dict[str, dict[str, int]]:
    """Operators and bytes of one call of our implementation, for every problem with a ratio."""
    result = {}
    for name, make in problems(device).items():
        problem, _ = make()
        with torch.inference_mode(problem.direction == "forward"):
            call, _ = problem.ready(OURS)
            result[name] = asdict(census(call))
    return result


def launches() -> dict[str, list[str]]:
    """The kernels that each function launches, in Triton's interpreter."""
    made: list[Problem] = [
        combine.predictions(SMOKE, "cpu", 1, "triton"),
        combine.predictions(SMOKE, "cpu", SMOKE.coming, "triton"),
        gram.row(SMOKE, "cpu", "triton"),
        head.outputs(SMOKE, "cpu", "triton"),
        kan_linear.layer(kan_linear.SMOKE, "cpu", "forward", "triton"),
        kan_linear.layer(kan_linear.SMOKE, "cpu", "backward", "triton"),
        kan_predict.predictions(SMOKE, "cpu", SMOKE.coming, "triton"),
    ]
    result = {}
    for problem in made:
        with counted_launches() as names:
            problem.ready(OURS)
        result[f"{problem.operation}, {problem.direction}"] = names
    return result


def machine_code() -> dict[str, dict[str, int]]:
    """Registers, instructions and access widths of the shipped configurations, compiled for sm_90."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gate.worker", str(CAPABILITY), *OPERATIONS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if run.returncode != 0:
        raise RuntimeError(f"the kernels do not compile for sm_{CAPABILITY}:\n{run.stderr[-4000:]}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    return {row.pop("case"): row for row in rows}
