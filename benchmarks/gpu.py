"""All measurements on a GPU, with one command and in less than 8 minutes on an H200.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json

The most important sections come first. Each group of sections runs in a separate process, since an invalid write of a
kernel makes the GPU unusable for its process. Rows are saved while they are measured. A section without time left is
skipped with a message. A provider that fails gives a row with the reason. The exit status is 1 if anything failed.
``--smoke`` runs everything with tiny sizes, also on a CPU in Triton's interpreter.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.clocks import WallClock, copy_bandwidth, measure
from lesa.reports.environment import describe_environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "diffusers", "cache-dit", "inkan")
CLOCK_SECONDS = 0.06  # for each clock of each provider
COMPILED = (
    "FLUX.1-dev 1024",
    "256 to 256",
)  # compiling takes seconds, so only the references of these shapes are compiled
LIMITS = {"kernels": 130.0, "kan": 50.0, "loops": 180.0, "tests": 100.0, "sanitizer": 40.0}  # seconds
LOOP_SECONDS = 25.0  # an architecture is skipped if less than this is left

Row = dict[str, Any]


class Run:
    """The device, the time limits, and the results so far."""

    def __init__(self, out: Path | None, *, smoke: bool, budget: float) -> None:
        self.out, self.smoke = out, smoke
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._end = time.monotonic() + budget
        self._section_end = self._end
        environment = describe_environment(PACKAGES)
        self.result: dict[str, Any] = {"environment": environment, "smoke": smoke, "seconds": {}}
        self.result |= {"skipped": [], "failed": []}

    @property
    def left(self) -> float:
        """Seconds left for this section."""
        return min(self._end, self._section_end) - time.monotonic()

    def skip(self, line: str) -> None:
        print(f"skipped: {line}", flush=True)
        self.result["skipped"].append(line)

    def fail(self, what: str, error: BaseException) -> str:
        """Record a failure and return its message."""
        line = f"{what}: {type(error).__name__}: {str(error).strip()[:500]}"
        print(f"FAILED {line}", flush=True)
        self.result["failed"].append(line)
        return line

    def section(self, name: str, measure_it: Callable[["Run"], Any]) -> None:
        start = time.monotonic()
        self._section_end = start + LIMITS.get(name, self._end)
        if self.left < 0:
            self.skip(f"{name}: no time left")
            return
        print(f"{name}: at most {self.left:.0f} s", flush=True)
        try:
            rows = self.result[name] = []
            for row in measure_it(self):
                rows.append(row)
                if len(rows) % 10 == 0:
                    self.save()
        except Exception as error:
            traceback.print_exc()
            self.fail(name, error)
        self.result["seconds"][name] = round(time.monotonic() - start, 1)
        self.save()

    def save(self) -> None:
        """Write the results so far."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def elsewhere(self, sections: list[str]) -> None:
        """Run these sections in a separate process and add its results."""
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [sys.executable, "-m", "benchmarks.gpu", "--here", *sections, "--out", str(part)]
            command += ["--budget", str(self._end - time.monotonic()), *(["--smoke"] if self.smoke else [])]
            done = subprocess.run(command, cwd=ROOT)
            found = json.loads(part.read_text()) if part.exists() else {}
        for key, value in found.items():
            if isinstance(value, list):
                self.result.setdefault(key, []).extend(value)
            elif key == "seconds":
                self.result[key] |= value
        if done.returncode not in (0, 1):
            self.fail(", ".join(sections), RuntimeError(f"its process ended with status {done.returncode}"))
        self.save()


def bandwidth(run: Run) -> list[Row]:
    """The rate of a copy, for several sizes."""
    sizes = [1 << 16] if run.smoke else [1 << power for power in (20, 22, 24, 26, 28, 30)]
    return [
        {"bytes": 2 * size, "gb_per_s": copy_bandwidth(run.device, size, budget=CLOCK_SECONDS) / 1e9} for size in sizes
    ]


def kernels(run: Run) -> Iterator[Row]:
    """Every function on the feature of every model."""
    from benchmarks.problems import combine, gram, head, interval, kan_predict, taylor
    from benchmarks.shapes import SHAPES, SMOKE

    shapes = [SMOKE] if run.smoke else list(SHAPES.values())
    if run.device == "cuda":
        largest = torch.cuda.get_device_properties(0).total_memory / 8
        shapes = [shape.within(largest) for shape in shapes]
    first = True
    for shape in tqdm(shapes, desc="kernels", delay=2):
        few = shape.within(shape.nbytes)  # 1/8 of the tokens: limited by arithmetic, not by bytes
        makers: list[Callable[[str], Any]] = [
            lambda backend, s=shape: combine.predictions(s, run.device, 1, backend),
            lambda backend, s=shape: combine.predictions(s, run.device, s.coming, backend),
            lambda backend, s=shape: taylor.taylor(s, run.device, backend),
            lambda backend, s=shape: head.outputs(s, run.device, backend),
            lambda backend, s=shape: gram.row(s, run.device, backend),
            lambda backend, s=few: kan_predict.predictions(s, run.device, 1, backend),
            lambda backend, s=few: kan_predict.predictions(s, run.device, s.coming, backend),
            lambda backend, s=shape: interval.predicted_step(s, run.device, backend),
            lambda backend, s=shape: interval.interval(s, run.device, backend),
            lambda backend, s=shape: combine.gradients(s, run.device, s.coming),
        ]
        for make in makers:
            if run.left < 0:
                run.skip(f"some functions on the feature of {shape.name}: no time left")
                break
            yield from problem_rows(run, make, compiled=shape.name in COMPILED or (run.smoke and first))
            first = False
            if run.device == "cuda":
                torch.cuda.empty_cache()


def kan(run: Run) -> Iterator[Row]:
    """A KAN layer, forward and backward."""
    from benchmarks.problems import kan_linear

    layers = [kan_linear.SMOKE] if run.smoke else list(kan_linear.LAYERS.values())
    for layer in tqdm(layers, desc="KAN layers", delay=2):
        for direction in ("forward", "backward"):
            if run.left < 0:
                run.skip(f"KAN layer {layer.name}, {direction}: no time left")
                continue
            yield from problem_rows(
                run,
                lambda backend, s=layer, d=direction: kan_linear.layer(s, run.device, d, backend),
                compiled=layer.name in COMPILED,
            )


def problem_rows(run: Run, make: Callable[[str], Any], *, compiled: bool) -> Iterator[Row]:
    """A row for each provider: its result is checked, its time measured by both clocks, bytes and launches counted."""
    from benchmarks.census import census
    from benchmarks.problems import problem as providers

    try:
        problem = make("auto")
        if run.smoke and run.device == "cpu" and find_spec("triton"):
            make("triton").ready(providers.OURS)  # checks the Triton kernel in the interpreter
    except Exception as error:
        run.fail("a problem", error)
        return
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if run.device == "cuda" else 0
    sets = max(1, min(16, 1 + 2 * l2 // problem.nbytes))
    compiled = compiled and not problem.operation.startswith("kan_predict")  # compiling it takes a minute
    for provider in problem.functions:
        if provider == providers.COMPILED and not compiled:
            continue
        row: Row = {"operation": problem.operation, "direction": problem.direction, "shape": problem.shape}
        row |= {"provider": provider, "bytes": problem.nbytes}
        try:
            with torch.inference_mode(problem.direction == "forward"):
                call, row["error"] = problem.ready(provider, sets=sets)
                for clock in ("device", "wall") if run.device == "cuda" else ("wall",):
                    budget, least = (0, 1) if run.smoke else (CLOCK_SECONDS, 5)
                    timing = measure(call, clock, run.device, budget=budget, least=least)
                    row |= timing.as_json(f"{clock}_")
                if provider in (providers.OURS, providers.REFERENCE):
                    counted = census(call)
                    row |= {"peak_bytes": counted.peak, "launches": counted.launches, "operators": counted.operators}
            row["gb_per_s"] = problem.nbytes / row.get("device_median", row["wall_median"]) / 1e9
        except torch.cuda.OutOfMemoryError:
            row["failed"] = "out of memory"
            run.skip(f"{problem.group}, {provider}: out of memory")
        except Exception as error:
            row["failed"] = run.fail(f"{problem.group}, {provider}", error)
            yield row
            if run.device == "cuda":
                torch.cuda.synchronize()  # raises if the GPU is no longer usable in this process
            continue
        yield row


def loops(run: Run) -> Iterator[Row]:
    """Denoising loops of real architectures, with random weights."""
    if not find_spec("diffusers"):
        run.skip("denoising loops: diffusers is not installed")
        return
    from benchmarks.architectures import ARCHITECTURES

    for architecture in ARCHITECTURES.values():
        if run.left < LOOP_SECONDS:
            run.skip(f"denoising loop of {architecture.name}: {run.left:.0f} s left")
            continue
        try:
            yield from loop_rows(run, architecture)
        except Exception as error:
            run.fail(architecture.name, error)
        if run.device == "cuda":
            torch.cuda.empty_cache()


def loop_rows(run: Run, architecture: Any) -> Iterator[Row]:
    """The full sampler, then every method with as many full steps."""
    from benchmarks.architectures import Loop
    from benchmarks.caches import FULL_SAMPLER, methods

    blocks, steps = (2, 12) if run.smoke else (architecture.blocks_measured, 50)
    dtype = torch.float32 if run.device == "cpu" else torch.bfloat16
    loop = Loop(architecture, blocks, run.device, dtype, tiny=run.smoke, steps=steps)
    step_seconds, block_seconds = full_step(loop, run.device, 2)
    # all steps of the full sampler cost the same: where all take too long, only a few are measured
    sampled = steps if steps * step_seconds < LOOP_SECONDS else 3
    missing = 0.0 if run.smoke else block_seconds * (architecture.blocks / blocks - 1)
    common: Row = {"architecture": architecture.name, "steps": steps, "blocks": blocks}
    common |= {"published_blocks": blocks if run.smoke else architecture.blocks}
    whole = 0.0  # seconds of the full sampler
    for name, enabled in methods(loop).items():
        if name == "cache-dit" and not find_spec("cache_dit"):
            run.skip(f"{architecture.name}: cache-dit is not installed")
            continue
        try:
            if name == FULL_SAMPLER:
                seconds, full = wall(lambda: loop(sampled), run.device) * steps / sampled, steps
                peak = peak_bytes(lambda: loop(1), run.device)
            else:
                with enabled(), loop.counted_full_steps() as runs:
                    if name != "cache-dit":  # its step counter needs complete generations
                        loop(min(steps, 6))
                    runs.clear()
                    seconds = wall(loop, run.device)
                    full = len(runs)
                    peak = peak_bytes(loop, run.device) if steps * step_seconds < LOOP_SECONDS else None
        except Exception as error:
            yield common | {"method": name, "failed": run.fail(f"{architecture.name}, {name}", error)}
            continue
        deep = seconds + full * missing
        whole = whole or deep
        yield common | {
            "method": name,
            "full_steps": full,
            "seconds": seconds,
            "full_step_seconds": step_seconds,
            "extrapolated_depth": missing > 0,
            "extrapolated_steps": name == FULL_SAMPLER and sampled < steps,
            "seconds_at_full_depth": deep,
            "speedup": whole / deep,
            "ideal": steps / full,
            "share_of_ideal": whole / deep * full / steps,
            "peak_bytes": peak,
        }
        print(f"  {architecture.name}, {name}: {full} full, {whole / deep:.2f}x of {steps / full:.2f}x", flush=True)


def full_step(loop: Any, device: str, rounds: int) -> tuple[float, float]:
    """Seconds of a full step, and of its blocks only."""
    clock, inside = WallClock(device), []
    lists = [module for module in loop.transformer.children() if isinstance(module, torch.nn.ModuleList)]
    hooks = [m.register_forward_pre_hook(lambda *_: clock.start()) for blocks in lists for m in blocks]
    hooks += [m.register_forward_hook(lambda *_: inside.append(clock.stop())) for blocks in lists for m in blocks]
    loop(1)
    inside.clear()
    loop(1)
    for hook in hooks:
        hook.remove()
    return statistics.median(wall(lambda: loop(1), device) for _ in range(rounds)), sum(inside)


def wall(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    clock = WallClock(device)
    clock.start()
    call()
    return clock.stop()


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The peak of the memory that a call allocates on a GPU, in addition to what was allocated before."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def tests(run: Run) -> list[Row]:
    """The tests of the kernels; on a GPU without the interpreter."""
    target = "tests/lesa_kernels/test_shards.py" if run.smoke else "tests/lesa_kernels"
    return command_row(run, "tests", [sys.executable, "-m", "pytest", target, "-v"])


def sanitizer(run: Run) -> list[Row]:
    """compute-sanitizer's memcheck on every kernel; on a CPU the same calls without it."""
    command = [sys.executable, "-m", "benchmarks.sanitize", *(["--few"] if run.smoke else [])]
    if run.device == "cuda":
        found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if found is None:
            run.skip("compute-sanitizer is not installed")
            return []
        command = [found, "--tool", "memcheck", "--error-exitcode", "9", *command]
    elif not find_spec("triton"):
        run.skip("sanitizer: triton is not installed")
        return []
    return command_row(run, "sanitizer", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def command_row(run: Run, name: str, command: list[str], **environment: str) -> list[Row]:
    """Run a command and return a row with its status."""
    limit = max(1.0, run.left)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        run.skip(f"{name}: not done after {limit:.0f} s")
        return [{"command": command[1:], "finished": False}]
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode != 0:
        run.fail(name, RuntimeError("\n".join(lines[-15:])))
    summary = [line for line in lines if re.search(r"\d+ (passed|failed)|ERROR SUMMARY|kernels ran", line)]
    return [{"command": command[1:], "finished": True, "status": done.returncode, "summary": summary}]


SECTIONS: dict[str, Callable[[Run], Iterable[Row]]] = {
    "copy": bandwidth,
    "kernels": kernels,
    "loops": loops,
    "kan": kan,
    "tests": tests,
    "sanitizer": sanitizer,
}
GROUPS = (("copy", "kernels"), ("loops",), ("kan",), ("tests", "sanitizer"))
SMOKE_GROUPS = (tuple(SECTIONS),)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--budget", type=float, default=470.0, metavar="SECONDS", help="time limit (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="run these sections only"
    )
    parser.add_argument(
        "--here", nargs="+", choices=SECTIONS, metavar="SECTION", help="run these sections in this process"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if not options.smoke:
            parser.error("there is no CUDA device here; --smoke runs on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    with suppress(AttributeError):
        torch._inductor.config.compile_threads = 8
    torch.manual_seed(0)
    run = Run(options.out, smoke=options.smoke, budget=options.budget)
    if options.here:
        for name in options.here:
            run.section(name, SECTIONS[name])
    else:
        for group in SMOKE_GROUPS if options.smoke else GROUPS:
            if chosen := [name for name in group if name in options.only]:
                run.elsewhere(chosen)
    failed = len(run.result["failed"])
    print(f"{failed} failures, {len(run.result['skipped'])} left out")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
