"""All measurements on a GPU with one command, the parts in the order of their worth, each its own process and file.

    python -m benchmarks.gpu --out benchmarks/results/gpu
    python -m benchmarks.gpu --out DIR --part kernels kan
    python -m benchmarks.gpu --out DIR --smoke               tiny sizes, also on a CPU in Triton's interpreter

An invalid write of a kernel makes the GPU unusable for its process, so each part has one. A part that takes too long is
stopped; what it wrote stays. The exit status is 1 if anything failed.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.gpu.part import ROOT, Part
from benchmarks.gpu.summary import load, summary

# Seconds at most on an H200; memcheck, the last one, gets what is left.
LIMITS = {"correctness": 150.0, "kernels": 110.0, "loops": 75.0, "kan": 60.0, "memcheck": 60.0}
GRACE = 5.0  # seconds between the time at which a part should end and its end


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the results")
    parser.add_argument("--part", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help="only these")
    parser.add_argument("--budget", type=float, default=560.0, metavar="SECONDS", help="for all (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--commit", help="of the code, where this machine does not have its history")
    parser.add_argument("--here", type=float, metavar="SECONDS", help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if not options.smoke:
            parser.error("there is no CUDA device here; --smoke runs on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    if options.here is not None:
        return run_here(options.part[0], options)
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Each part in a process of its own, then the summary."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part in progress is stopped as well
    end = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.part:  # results of an earlier run must not pass for those of this one
        for suffix in ("json", "txt"):
            (options.out / f"{name}.{suffix}").unlink(missing_ok=True)
    for name in options.part:
        print(f"{name}: {'no limit' if options.smoke else f'at most {LIMITS[name]:.0f} s'}", flush=True)
    for name in options.part:
        left = end - time.monotonic()
        limit = 1e6 if options.smoke else left if name == "memcheck" else min(LIMITS[name], left)
        if limit <= GRACE:
            print(f"{name}: no time left", flush=True)
            continue
        print(f"== {name}", flush=True)
        run_part(name, limit, options)
    lines = summary(options.out, options.part)
    (options.out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    results = [load(options.out, name) for name in options.part]
    return int(any(result is None or result["failed"] or not result["finished"] for result in results))


def run_part(name: str, limit: float, options: argparse.Namespace) -> None:
    """One part, stopped with everything that it started when its time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), "--part", name]
    command += ["--here", str(limit - GRACE), *(["--smoke"] if options.smoke else [])]
    command += ["--commit", options.commit] if options.commit else []
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {limit:.0f} s", flush=True)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_here(name: str, options: argparse.Namespace) -> int:
    """One part in this process."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    torch.manual_seed(0)
    part = Part(options.out, name, smoke=options.smoke, budget=options.here, commit=options.commit)
    try:
        importlib.import_module(f"benchmarks.gpu.{name}").measure(part)
    except Exception as error:
        traceback.print_exc()
        part.fail(name, error)
    part.finish()
    return int(bool(part.result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
