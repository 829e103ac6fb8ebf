"""How much of the ideal speed-up arrives: inside transformer calls and in the whole denoising loop, on the demo model.

    python -m benchmarks.demo_loop --out benchmarks/results/demo_loop.json

All methods take turns in one process, each with 10 full steps of 50; a row's figures are medians over the rounds of the
ratio to the full sampler of the same round. Ours are measured beside diffusers' TaylorSeer in its lite mode and
cache-dit (one block always runs, the others by a steps mask with a TaylorSeer calibrator).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig
from tqdm import tqdm

import lesa
from lesa.demo.measure import labels_of
from lesa.demo.model import load_pipeline, request
from lesa.demo.run import load_predictor
from lesa.demo.taylorseer import count_full_steps
from lesa.environment import describe_environment

STEPS, INTERVAL = 50, 7
PLAN = lesa.StepPlan.paper(STEPS, INTERVAL)
BATCHES = {256: 7, 1: 41}  # rounds for each batch size

Method = tuple[str, FluxPipeline, Callable[[], AbstractContextManager[Any]]]


def methods() -> list[Method]:
    """The full sampler first; cache-dit patches the transformer, so it has a pipeline of its own."""
    pipeline, patched = load_pipeline(), load_pipeline()
    predictor = load_predictor("lesa-n5")  # the one for 7 is fitted live in the demo; on a plan all cost the same
    return [
        ("full sampler", pipeline, nullcontext),
        ("LESA", pipeline, lambda: lesa.enable(pipeline, predictor, PLAN)),
        ("Taylor 2", pipeline, lambda: lesa.enable(pipeline, lesa.Taylor(2), PLAN)),
        ("reuse", pipeline, lambda: lesa.enable(pipeline, lesa.Reuse(), PLAN)),
        ("diffusers TaylorSeer (lite)", pipeline, lambda: taylorseer(pipeline)),
        ("cache-dit", patched, lambda: cache_dit(patched)),
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
def timed_calls(pipeline: FluxPipeline) -> Iterator[list[float]]:
    """The seconds of each call that the pipeline makes of its transformer, whatever is put into it."""
    seconds: list[float] = []
    kind = type(pipeline.transformer)
    call, own = kind.__call__, "__call__" in vars(kind)

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    kind.__call__ = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        if own:
            kind.__call__ = call  # type: ignore[method-assign]
        else:
            del kind.__call__


def measure(batch: int, rounds: int, chosen: list[Method]) -> list[dict[str, Any]]:
    """A row for each method but the full sampler."""
    loops: dict[str, list[float]] = {name: [] for name, *_ in chosen}
    calls: dict[str, list[float]] = {name: [] for name, *_ in chosen}
    full_steps: dict[str, int] = {}
    for number in tqdm(range(rounds + 1), desc=f"batch {batch}", delay=2):
        for name, pipeline, enabled in chosen:
            seeds = range(batch)
            arguments = request(labels_of(seeds).tolist(), seeds, num_steps=STEPS)
            with enabled():
                # what happens once, when a method is put in or meets a schedule, is not part of a generation
                pipeline(**request([0], [0], num_steps=STEPS))
                with count_full_steps(pipeline, block=1) as full, timed_calls(pipeline) as seconds:
                    start = time.perf_counter()
                    pipeline(**arguments)
                    loop = time.perf_counter() - start
            full_steps[name] = len(full)
            if number > 0:  # the first round warms up
                loops[name].append(loop)
                calls[name].append(sum(seconds))
    whole = chosen[0][0]

    def speedup(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[whole], times[name], strict=True))

    return [
        {
            "method": name,
            "batch": batch,
            "full_steps": full_steps[name],
            "ideal": STEPS / full_steps[name],
            "speedup_transformer": speedup(calls, name),
            "speedup_loop": speedup(loops, name),
            "share_transformer": speedup(calls, name) * full_steps[name] / STEPS,
            "share_loop": speedup(loops, name) * full_steps[name] / STEPS,
            "rounds": rounds,
        }
        for name, *_ in chosen[1:]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = methods()
    environment = describe_environment(["torch", "diffusers", "cache-dit"])
    rows = [
        row | {"environment": environment}
        for batch, rounds in BATCHES.items()
        for row in measure(batch, rounds, chosen)
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
