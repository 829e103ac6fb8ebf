"""Denoising loops of real architectures with random weights: the full sampler, then every method with as many steps."""

import statistics
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.clocks import WallClock
from benchmarks.gpu.part import Part, Row

LOOP_SECONDS = 25.0  # an architecture is skipped if less than this is left


def measure(part: Part) -> None:
    if not find_spec("diffusers"):
        part.skip("denoising loops: diffusers is not installed")
        return
    from benchmarks.architectures import ARCHITECTURES

    for architecture in ARCHITECTURES.values():
        if part.left < LOOP_SECONDS and not part.smoke:
            part.skip(f"denoising loop of {architecture.name}: {part.left:.0f} s left")
            continue
        try:
            measure_loop(part, architecture)
        except Exception as error:
            part.fail(architecture.name, error)
        if part.on_gpu:
            torch.cuda.synchronize()  # raises if the GPU is no longer usable in this process
            torch.cuda.empty_cache()


def measure_loop(part: Part, architecture: Any) -> None:
    """A row for each method."""
    from benchmarks.architectures import Loop
    from benchmarks.caches import FULL_SAMPLER, methods

    blocks, steps = (2, 12) if part.smoke else (architecture.blocks_measured, 50)
    dtype = torch.bfloat16 if part.on_gpu else torch.float32
    loop = Loop(architecture, blocks, part.device, dtype, tiny=part.smoke, steps=steps)
    step_seconds, block_seconds = full_step(loop, part.device, 2)
    # all steps of the full sampler cost the same: where all take too long, only a few are measured
    sampled = steps if steps * step_seconds < LOOP_SECONDS else 3
    missing = 0.0 if part.smoke else block_seconds * (architecture.blocks / blocks - 1)
    common: Row = {"architecture": architecture.name, "steps": steps, "blocks": blocks}
    common |= {"published_blocks": blocks if part.smoke else architecture.blocks}
    whole = 0.0  # seconds of the full sampler
    for name, enabled in methods(loop).items():
        if name == "cache-dit" and not find_spec("cache_dit"):
            part.skip(f"{architecture.name}: cache-dit is not installed")
            continue
        row: Row = common | {"method": name, "full_step_seconds": step_seconds, "peak_bytes": None}
        try:
            with enabled(), loop.counted_full_steps() as runs:
                if name == FULL_SAMPLER:
                    seconds, full = wall(lambda: loop(sampled), part.device) * steps / sampled, steps
                    row |= watched(lambda: loop(4), part.device)
                else:
                    row["first_seconds"] = wall(loop, part.device)  # its kernels are compiled in it
                    runs.clear()
                    seconds = wall(loop, part.device)
                    full = len(runs)
                    if steps * step_seconds < LOOP_SECONDS:
                        seconds = min(seconds, wall(loop, part.device))
                        row |= watched(loop, part.device)
        except Exception as error:
            part.add(row | {"failed": part.fail(f"{architecture.name}, {name}", error)})
            continue
        deep = seconds + full * missing
        whole = whole or deep
        part.add(
            row
            | {
                "full_steps": full,
                "seconds": seconds,
                "extrapolated_depth": missing > 0,
                "extrapolated_steps": name == FULL_SAMPLER and sampled < steps,
                "seconds_at_full_depth": deep,
                "speedup": whole / deep,
                "ideal": steps / full,
                "share_of_ideal": whole / deep * full / steps,
            }
        )
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


def watched(generate: Callable[[], Any], device: str) -> Row:
    """The memory that a generation allocates at its peak, and how often the host waits for the GPU in it, and where.

    The loop itself waits too, when it sets its timesteps.
    """
    if device != "cuda":
        return {"peak_bytes": None, "synchronisations": None}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    places = [
        f"{w.filename.rsplit('/site-packages/', 1)[-1]}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)
    ]
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "synchronisations": len(places),
        "synchronised_at": list(dict.fromkeys(places))[:8],
    }
