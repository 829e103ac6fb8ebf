"""How much of the ideal speed-up arrives: inside transformer calls and in the whole denoising loop, on the demo model.

    python -m benchmarks.demo_loop --out benchmarks/results/demo_loop.json

All methods run in one process, each with 10 full steps of 50, and take turns: of a step at batch 256, of a whole
generation, which is as short, at batch 1. A step's cost is its time in units of the full sampler's step of the same
number, the median over the rounds; what all steps cost together gives the speed-up. Ours are measured beside diffusers'
TaylorSeer in its lite mode and cache-dit (one block always runs, the others by a steps mask with a TaylorSeer
calibrator). One thread, so that no step waits for the slower of two, and memory stays with the process (heap.py).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig
from tqdm import tqdm

import lesa
from benchmarks.heap import keep_freed_memory
from benchmarks.lockstep import run_in_lockstep
from lesa.demo.measure import labels_of
from lesa.demo.model import load_pipeline, request
from lesa.demo.run import load_predictor
from lesa.demo.taylorseer import count_full_steps
from lesa.environment import describe_environment

STEPS, INTERVAL = 50, 7
PLAN = lesa.StepPlan.paper(STEPS, INTERVAL)
FULL_SAMPLER = "full sampler"
BATCHES = {256: (9, 1), 1: (41, STEPS)}  # rounds for each batch size, and the steps of a turn

Method = tuple[str, FluxPipeline, Callable[[], AbstractContextManager[Any]]]


def methods() -> list[Method]:
    """The full sampler first; each has a pipeline of its own, since they run side by side."""
    predictor = load_predictor("lesa-n5")  # the one for 7 is fitted live in the demo; on a plan all cost the same
    enabled: dict[str, Callable[[FluxPipeline], AbstractContextManager[Any]]] = {
        FULL_SAMPLER: nullcontext,
        "LESA": lambda pipeline: lesa.enable(pipeline, predictor, PLAN),
        "Taylor 2": lambda pipeline: lesa.enable(pipeline, lesa.Taylor(2), PLAN),
        "reuse": lambda pipeline: lesa.enable(pipeline, lesa.Reuse(), PLAN),
        "diffusers TaylorSeer (lite)": taylorseer,
        "cache-dit": cache_dit,
    }
    return [
        (name, pipeline, partial(enable, pipeline))
        for name, enable in enabled.items()
        for pipeline in [load_pipeline()]
    ]


@contextmanager
def taylorseer(pipeline: FluxPipeline) -> Iterator[None]:
    config = TaylorSeerCacheConfig(
        cache_interval=INTERVAL,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    pipeline.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


@contextmanager
def cache_dit(pipeline: FluxPipeline) -> Iterator[None]:
    import cache_dit

    cache_dit.enable_cache(
        pipeline,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=3,
            num_inference_steps=STEPS,
            steps_computation_mask=[int(PLAN.is_full(step)) for step in range(STEPS)],
            steps_computation_policy="static",
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(pipeline)


@contextmanager
def timed_calls(pipeline: FluxPipeline) -> Iterator[list[tuple[float, float]]]:
    """The beginning and end of each call that the pipeline makes of its transformer, whatever is put into it."""
    moments: list[tuple[float, float]] = []
    kind = type(pipeline.transformer)
    call, own = kind.__call__, "__call__" in vars(kind)

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(self, *args, **kwargs)
        if self is pipeline.transformer:
            moments.append((start, time.perf_counter()))
        return result

    kind.__call__ = timed  # type: ignore[method-assign]
    try:
        yield moments
    finally:
        if own:
            kind.__call__ = call  # type: ignore[method-assign]
        else:
            del kind.__call__


Steps = list[float]  # seconds of each step


def measure(batch: int, rounds: int, turn: int, chosen: list[Method]) -> list[dict[str, Any]]:
    """A row for each method but the full sampler."""
    calls: dict[str, list[Steps]] = {name: [] for name, *_ in chosen}
    loops: dict[str, list[Steps]] = {name: [] for name, *_ in chosen}
    seeds = range(batch)
    arguments = request(labels_of(seeds).tolist(), seeds, num_steps=STEPS)
    with ExitStack() as stack:
        for _, _, enabled in chosen:
            stack.enter_context(enabled())
        full_steps = {name: stack.enter_context(count_full_steps(pipeline, block=1)) for name, pipeline, _ in chosen}
        for number in tqdm(range(rounds + 1), desc=f"batch {batch}", delay=2):
            with ExitStack() as timing:
                timed = {name: timing.enter_context(timed_calls(pipeline)) for name, pipeline, _ in chosen}
                # what happens once, when a method meets a schedule, is not part of a generation
                generations = {name: partial(generate, pipeline, arguments, turn) for name, pipeline, _ in chosen}
                steps = run_in_lockstep(generations, turn)
            if number == 0:  # the first round warms up
                continue
            for name, every in timed.items():
                moments = every[-STEPS:]
                calls[name].append([end - start for start, end in moments])
                begun = [moments[0][0], *(start for start, _ in steps[name][1:])]  # the loop begins with the first call
                loops[name].append([end - start for start, (_, end) in zip(begun, steps[name], strict=True)])
        counts = {name: len(full) for name, full in full_steps.items()}
    rows = []
    for name, *_ in chosen[1:]:
        transformer, loop = (STEPS / cost(times[name], times[FULL_SAMPLER]) for times in (calls, loops))
        rows.append(
            {
                "method": name,
                "batch": batch,
                "full_steps": counts[name],
                "ideal": STEPS / counts[name],
                "speedup_transformer": transformer,
                "speedup_loop": loop,
                "share_transformer": transformer * counts[name] / STEPS,
                "share_loop": loop * counts[name] / STEPS,
                "rounds": rounds,
                "turn": turn,
            }
        )
    return rows


def generate(pipeline: FluxPipeline, arguments: dict[str, Any], turn: int, step_done: Callable[[], None]) -> None:
    """The generation that is timed; where it is one turn, after another one, as in a process that does nothing else."""
    if turn == STEPS:
        pipeline(**arguments)

    def at_end(_: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        step_done()
        return {}

    pipeline(**arguments, callback_on_step_end=at_end)


def cost(rounds: list[Steps], full: list[Steps]) -> float:
    """Of a generation, in full steps."""
    return sum(
        statistics.median(mine[step] / theirs[step] for mine, theirs in zip(rounds, full, strict=True))
        for step in range(STEPS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    chosen = methods()
    environment = describe_environment(["torch", "diffusers", "cache-dit"])
    rows = [
        row | {"environment": environment}
        for batch, (rounds, turn) in BATCHES.items()
        for row in measure(batch, rounds, turn, chosen)
    ]
    for row in rows:
        print(
            f"batch {row['batch']:4d}  {row['method']:28s} {row['full_steps']} full  "
            f"transformer {row['speedup_transformer']:.2f}x ({row['share_transformer']:.1%} of ideal)  "
            f"loop {row['speedup_loop']:.2f}x ({row['share_loop']:.1%})"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
