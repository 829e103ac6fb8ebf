"""The regression check: ``make bench-check`` compares this checkout with the baseline that ``make bench-expect`` wrote.

The ratio of a kernel's time to its reference's may grow by the factor ``SLOWER``. A ratio that grew more is measured
again, since a machine is rarely disturbed three times in a row. Operators, bytes, launches and machine code must be
equal. A baseline of another kind of machine or of other versions is less exact: then ratios may double, counts are not
compared, and a message is printed. ``--write`` writes a new baseline.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import exact, ratios
from benchmarks.memory import keep_freed_memory
from benchmarks.problems.problem import Problem
from lesa.reports.environment import describe_environment

EXPECTATIONS = Path(__file__).parent / "expectations.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Repeated measurements on a busy machine of two cores differed by 8 % at most, and mostly by less than 4 %. A kernel
# that became 25 % slower must be detected.
SLOWER = 1.15
SLOWER_ELSEWHERE = 2.0
ATTEMPTS = 3

Make = Callable[[], tuple[Problem, str]]


def machine() -> str:
    """The kind of machine, the key of ratios and counts in the baseline."""
    name = describe_environment()["device"]
    return name if DEVICE == "cuda" else f"{name}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def torch_version() -> str:
    return torch.__version__.split("+")[0]


def measure_ratios(problems: dict[str, Make], seconds: float = ratios.SECONDS) -> dict[str, ratios.Ratio]:
    """The ratio of each problem, by name."""
    return {name: _ratio(make, seconds) for name, make in tqdm(problems.items(), desc="ratios", delay=2)}


def compare_ratios(
    problems: dict[str, Make], expected: dict[str, float], slower: float, seconds: float = ratios.SECONDS
) -> Iterator[str]:
    """A message for each ratio that grew by more than the factor ``slower`` in all of several measurements."""
    for name, make in tqdm(problems.items(), desc="ratios", delay=2):
        if name not in expected:
            yield f"{name}: nothing is expected of it yet; make bench-expect"
            continue
        best = float("inf")
        for _ in range(ATTEMPTS):
            best = min(best, _ratio(make, seconds).value)
            if best <= slower * expected[name]:
                break
        print(f"  {name:42s} {best:.3f} of its reference's time, expected {expected[name]:.3f}")
        if best > slower * expected[name]:
            yield (
                f"{name}: {best / expected[name] - 1:.0%} slower than expected beside its reference "
                f"({best:.3f}, expected {expected[name]:.3f}, {slower - 1:.0%} allowed)"
            )


def compare_exactly(what: str, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """A message for each difference."""
    for name in sorted(found.keys() | expected.keys()):
        was, now = expected.get(name), found.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            changed = ", ".join(f"{k} {was.get(k)} -> {now.get(k)}" for k in now if was.get(k) != now.get(k))
        else:
            changed = f"{was} -> {now}"
        yield f"{what} of {name}: {changed}"


def check(expected: dict[str, Any], parts: list[str]) -> list[str]:
    """A message for each difference from the baseline."""
    found: list[str] = []
    if "launches" in parts:
        found += compare_exactly("launches", exact.launches(), expected["launches"])
    if "counts" in parts:
        key = f"{machine()}, torch {torch_version()}"
        if key in expected["counts"]:
            found += compare_exactly("counts", exact.counts(DEVICE), expected["counts"][key])
        else:
            print(f"Operators and bytes were counted on {list(expected['counts'])}, not on {key}: not compared.")
    if "ratios" in parts:
        known, slower = expected["ratios"].get(machine()), SLOWER
        if known is None:
            print(f"Ratios were measured on {list(expected['ratios'])}, not on {machine()}: they may double.")
            known, slower = next(iter(expected["ratios"].values())), SLOWER_ELSEWHERE
        found += compare_ratios(ratios.problems(DEVICE), known, slower)
    if "code" in parts:
        if version("triton") == expected["machine code"]["triton"]:
            found += compare_exactly("machine code", exact.machine_code(), expected["machine code"]["cases"])
        else:
            print(f"Machine code was compiled by Triton {expected['machine code']['triton']}: not compared.")
    return found


def write(path: Path, parts: list[str]) -> None:
    """Write a new baseline for this machine; those of other machines stay."""
    expected: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "launches" in parts:
        expected["launches"] = exact.launches()
    if "counts" in parts:
        expected.setdefault("counts", {})[f"{machine()}, torch {torch_version()}"] = exact.counts(DEVICE)
    if "ratios" in parts:
        runs = [measure_ratios(ratios.problems(DEVICE)) for _ in range(ATTEMPTS)]
        middle = {name: statistics.median(run[name].value for run in runs) for name in runs[0]}
        expected.setdefault("ratios", {})[machine()] = {name: round(ratio, 4) for name, ratio in middle.items()}
    if "code" in parts:
        expected["machine code"] = {"triton": version("triton"), "cases": exact.machine_code()}
    path.write_text(json.dumps(expected, indent=1) + "\n")


def _ratio(make: Make, seconds: float) -> ratios.Ratio:
    problem, other = make()
    return ratios.measure(problem, other, DEVICE, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["launches", "counts", "ratios", "code"]
    parser.add_argument("--write", action="store_true", help="write a new baseline instead")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--expectations", type=Path, default=EXPECTATIONS, metavar="PATH")
    options = parser.parse_args()
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        torch.set_num_threads(1)
        keep_freed_memory()
    torch.manual_seed(0)
    if options.write:
        write(options.expectations, options.only)
        return
    found = check(json.loads(options.expectations.read_text()), options.only)
    for line in found:
        print(f"FAILED {line}")
    if found:
        sys.exit("If this is meant, make bench-expect writes it down.")
    print("As expected.")


if __name__ == "__main__":
    main()
