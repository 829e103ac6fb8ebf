"""Every kernel once, then the tests of the kernels and those that only a GPU can run."""

import os
import re
import sys
from importlib.util import find_spec

from benchmarks.gpu.part import ROOT, Part

# Tests of code for CPUs; they would only take time.
ELSEWHERE = (
    "kan_linear/test_cpu.py",
    "kan_linear/test_peers.py",
    "kan_linear/test_modules.py",
    "kan_linear/test_bases.py",
)


def measure(part: Part) -> None:
    status, lines = part.command([sys.executable, "-m", "benchmarks.sanitize", "--few"])
    part.add({"what": "every kernel once", "status": status, "summary": lines[-1:]})
    if status != 0:
        part.fail("every kernel once", "\n".join(lines[-5:]) or "no output")
    status, lines = part.command([sys.executable, "-m", "pytest", *pytest_arguments(part)])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)][-1:]
    part.add({"what": "tests", "status": status, "summary": summary, "failed": failed[:40]})
    if status != 0:
        part.fail("tests", "\n".join(failed[:5] or lines[-5:]) if status is not None else "not done in time")


def pytest_arguments(part: Part) -> list[str]:
    arguments = ["-rf", "-p", "no:cacheprovider"]
    if part.smoke:
        return ["tests/lesa_kernels/test_shards.py", *arguments]
    folders = [folder for folder in ("tests/lesa_kernels", "tests/native") if (ROOT / folder).is_dir()]
    arguments += [f"--ignore=tests/lesa_kernels/ops/{name}" for name in ELSEWHERE]
    arguments += [
        "--ignore=tests/lesa_kernels/test_shards.py",
        "-k",
        "not cpu and not finite_differences",
        "--tb=short",
    ]
    if find_spec("xdist"):
        arguments += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        arguments += ["--timeout", "100"]
    return [*folders, *arguments]
