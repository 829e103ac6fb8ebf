"""``pytest benchmarks`` checks and times every provider of every problem. ``make bench`` runs it.

A group is an operation, a direction, a shape and a clock, so that a table compares providers. Shapes that are too large
for a machine get fewer tokens, and their names then have the number. ``--benchmark-json`` writes everything,
``--condensed`` the few numbers that are committed.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.census import census
from benchmarks.clocks import Timer, WallClock, make_clock
from benchmarks.memory import keep_freed_memory
from benchmarks.problems.problem import Problem
from benchmarks.shapes import SHAPES, SMOKE, Shape
from lesa.reports.environment import describe_environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCKS = ("device", "wall") if DEVICE == "cuda" else ("wall",)
PACKAGES = ("torch", "triton", "diffusers", "cache-dit", "inkan")
SECONDS = 0.2  # total time of the rounds of a benchmark
L2_BYTES = 64 * 2**20  # of the largest GPUs; enough inputs are used in turn to exceed it twice


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lesa")
    default = 100_000 if DEVICE == "cuda" else 32
    group.addoption(
        "--largest", type=float, default=default, metavar="MIB", help="largest size of the history (%(default)s)"
    )
    group.addoption("--smoke", action="store_true", help="one tiny shape, to test that everything runs")
    group.addoption(
        "--condensed", type=Path, metavar="PATH", help="write the numbers that are committed: medians, bytes, errors"
    )


def pytest_configure(config: pytest.Config) -> None:
    for option, usual, ours in (("benchmark_max_time", 1.0, SECONDS), ("benchmark_min_rounds", 5, 3)):
        if float(getattr(config.option, option)) == usual:  # the option was not given
            setattr(config.option, option, ours)
    keep_freed_memory()
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_group_by = "group"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "clock" in metafunc.fixturenames:
        metafunc.parametrize("clock", CLOCKS)
    if "shape" in metafunc.fixturenames:
        shapes = [SMOKE] if metafunc.config.getoption("smoke") else fitting(metafunc.config.getoption("largest"))
        metafunc.parametrize("shape", shapes, ids=lambda shape: shape.name, scope="module")


def fitting(largest: float) -> list[Shape]:
    """The shapes, cut to at most ``largest`` MiB of history; of shapes that are then equal only the first."""
    if DEVICE == "cuda":
        largest = min(largest, torch.cuda.get_device_properties(0).total_memory / 2**20 / 6)
    shapes = [shape.within(largest * 2**20) for shape in SHAPES.values()]
    return list({dataclasses.replace(shape, name=""): shape for shape in reversed(shapes)}.values())[::-1]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lesa"] = describe_environment(PACKAGES)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["environment"] = output_json["machine_info"]["lesa"]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    path, found = session.config.getoption("condensed"), getattr(session.config, "_benchmarksession", None)
    if path is None or found is None:
        return
    rows = [
        {
            "group": b.group,
            "provider": b.params.get("provider") if b.params else b.name,
            "median": b.stats.median,
            "iqr": b.stats.iqr,
            "rounds": b.stats.rounds,
            **b.extra_info,
        }
        for b in found.benchmarks
        if b.stats.rounds
    ]
    rows_text = ",\n  ".join(json.dumps(row) for row in rows)
    environment = json.dumps(describe_environment(PACKAGES))
    path.write_text(f'{{\n "environment": {environment},\n "rows": [\n  {rows_text}\n ]\n}}\n')


@pytest.fixture
def bench(benchmark: Any, clock: str) -> Callable[[Problem, str], None]:
    """``bench(problem, provider)`` checks the result, times the call and records bytes and operators."""

    def run(problem: Problem, provider: str) -> None:
        if provider not in problem.functions:
            pytest.skip(f"{provider} is not installed, or does not serve this shape")
        sets = max(1, min(16, 2 * L2_BYTES // problem.nbytes)) if DEVICE == "cuda" else 1
        with torch.inference_mode(problem.direction == "forward"):
            call, error = problem.ready(provider, sets=sets)
            time_call(benchmark, call, clock, problem.group)
            counted = census(call) if benchmark.enabled else None
        if counted is None:
            return
        info = {"bytes": problem.nbytes, "error": error, "peak_bytes": counted.peak, "operators": counted.operators}
        if DEVICE == "cuda":
            info["launches"] = counted.launches
        benchmark.extra_info |= info | {"gb_per_s": problem.nbytes / benchmark.stats.stats.median / 1e9}

    return run


def time_call(benchmark: Any, call: Callable[[], Any], clock: str, group: str) -> None:
    """Time a call for pytest-benchmark's table: with its own loop on a CPU, with our two clocks on a GPU."""
    benchmark.group = group if DEVICE == "cpu" else f"{group}/{clock}"
    if DEVICE == "cpu":
        call()
        benchmark(call)
        return
    used, iterations, estimate = make_clock(call, clock, DEVICE)
    timer = Timer(used if clock == "device" else WallClock(DEVICE))
    benchmark._timer = timer  # a private attribute, but the only way to set another clock; the package is pinned
    rounds = max(5, min(200, int(SECONDS / (iterations * estimate))))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
