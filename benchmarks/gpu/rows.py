"""A row for each provider of a problem: checked, timed by both clocks, bytes and launches counted."""

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.census import census
from benchmarks.clocks import measure
from benchmarks.gpu.part import Part, Row
from benchmarks.problems import problem as providers

CLOCK_SECONDS = 0.05  # for each clock of each provider


def measure_problem(
    part: Part,
    make: Callable[[str], Any],
    *,
    without: Collection[str] = (),
    counted: bool = True,
    extra: Callable[[Any, str], Row] | None = None,
) -> None:
    """Measure all providers of the problem that ``make`` makes for a backend.

    Args:
        part: gets the rows.
        make: (backend) -> the problem.
        without: providers to leave out.
        counted: launches and bytes are counted as well, by the profiler.
        extra: (problem, provider) -> more columns.
    """
    try:
        problem = make("auto")
        if part.smoke and not part.on_gpu and find_spec("triton"):
            make("triton").ready(providers.OURS)  # checks the Triton kernel in the interpreter
    except Exception as error:
        part.fail("a problem", error)
        return
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if part.on_gpu else 0
    sets = max(1, min(16, 1 + 2 * l2 // problem.nbytes))
    for provider in problem.functions:
        if provider in without or (provider == providers.COMPILED and problem.operation.startswith("kan_predict")):
            continue  # compiling the reference of kan_predict takes a minute
        row: Row = {"operation": problem.operation, "direction": problem.direction, "shape": problem.shape}
        row |= {"provider": provider, "bytes": problem.nbytes}
        try:
            with torch.inference_mode(problem.direction == "forward"):
                call, row["error"] = problem.ready(provider, sets=sets)
                for clock in ("device", "wall") if part.on_gpu else ("wall",):
                    budget, least = (0, 1) if part.smoke else (CLOCK_SECONDS, 5)
                    row |= measure(call, clock, part.device, budget=budget, least=least).as_json(f"{clock}_")
                if counted and provider in (providers.OURS, providers.REFERENCE):
                    found = census(call)
                    row |= {"peak_bytes": found.peak, "launches": found.launches, "operators": found.operators}
            row["gb_per_s"] = problem.nbytes / row.get("device_median", row["wall_median"]) / 1e9
            row |= extra(problem, provider) if extra else {}
        except torch.cuda.OutOfMemoryError:
            row["failed"] = "out of memory"
            part.skip(f"{problem.group}, {provider}: out of memory")
        except Exception as error:
            row["failed"] = part.fail(f"{problem.group}, {provider}", error)
            part.add(row)
            if part.on_gpu:
                torch.cuda.synchronize()  # raises if the GPU is no longer usable in this process
            continue
        part.add(row)
    if part.on_gpu:
        torch.cuda.empty_cache()
