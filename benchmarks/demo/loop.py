"""The share of the ideal speed-up that is reached in transformer calls and in the denoising loop of the demo model.

    python -m benchmarks.demo.loop --out benchmarks/results/demo_loop.json

All methods run in one process, each with 10 full steps of 50. Every generation runs between two turns of the full
sampler; their mean time per step is the unit of its cost. The order of methods changes in each round, and so do their
pipelines (except cache-dit's), since the location of a model in memory changes times by some percent. The speed-up is
that of the median cost over the rounds; quartiles show the variation. Others: diffusers' TaylorSeer in its lite mode,
and cache-dit (the first block always runs, the others by a steps mask with a TaylorSeer calibrator). One thread, so
that no step waits for a second one, and freed memory is kept.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig
from tqdm import tqdm

import lesa
from benchmarks.demo.run import load_predictor
from benchmarks.demo.taylorseer import count_full_steps
from benchmarks.memory import keep_freed_memory
from benchmarks.turns import Step, take_turns
from lesa.demo.model import labels_of, load_pipeline, request
from lesa.reports.environment import describe_environment

STEPS, INTERVAL = 50, 7
PLAN = lesa.StepPlan.paper(STEPS, INTERVAL)
FULL_SAMPLER, CACHE_DIT = "full sampler", "cache-dit"
BATCHES = {256: 10, 1: 45}  # rounds for each batch size

Method = tuple[str, FluxPipeline, Callable[[FluxPipeline], AbstractContextManager[Any]]]
T = TypeVar("T")


def methods() -> list[Method]:
    """The full sampler first; each method has its own pipeline, since they run in turns."""
    predictor = load_predictor("lesa-n5")  # the demo fits the one for 7 itself; the cost depends on the plan only
    enabled: dict[str, Callable[[FluxPipeline], AbstractContextManager[Any]]] = {
        FULL_SAMPLER: nullcontext,
        "LESA": lambda pipeline: lesa.enable(pipeline, predictor, PLAN),
        "Taylor 2": lambda pipeline: lesa.enable(pipeline, lesa.Taylor(2), PLAN),
        "reuse": lambda pipeline: lesa.enable(pipeline, lesa.Reuse(), PLAN),
        "diffusers TaylorSeer (lite)": taylorseer,
        CACHE_DIT: cache_dit,
    }
    return [(name, load_pipeline(), enable) for name, enable in enabled.items()]


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
def timed_calls(pipeline: FluxPipeline) -> Iterator[list[Step]]:
    """Start and end of each call of the pipeline's transformer, with any cache enabled."""
    moments: list[Step] = []
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


class Costs(NamedTuple):
    """The cost of a generation in full steps: of its transformer calls, and of its denoising loop."""

    transformer: float
    loop: float


def measure(batch: int, rounds: int, chosen: list[Method]) -> list[dict[str, Any]]:
    """A row for each method except the full sampler."""
    seeds = range(batch)
    arguments = request(labels_of(seeds).tolist(), seeds, num_steps=STEPS)
    others = chosen[1:]
    costs: dict[str, list[Costs]] = {name: [] for name, *_ in others}
    counts: dict[str, int] = {}
    for number in tqdm(range(rounds + 1), desc=f"batch {batch}", delay=2):
        order = [chosen[0], *rotated(others, number)]
        with ExitStack() as stack:
            for _, pipeline, enabled in order:
                stack.enter_context(enabled(pipeline))
                pipeline(**request([0], [0], num_steps=STEPS))  # does the work that is done once for a schedule
            full = {name: stack.enter_context(count_full_steps(pipeline, block=1)) for name, pipeline, _ in order}
            for name, cost in one_round(arguments, order).items():
                if number > 0:  # the first round warms up
                    costs[name].append(cost)
            counts = {name: len(steps) for name, steps in full.items()}
        chosen = moved(chosen)
        others = chosen[1:]
    rows = []
    for name, measured in costs.items():
        transformer, loop = (STEPS / statistics.median(column) for column in zip(*measured, strict=True))
        high, _, low = (counts[name] / cost for cost in statistics.quantiles(c.transformer for c in measured))
        rows.append(
            {
                "method": name,
                "batch": batch,
                "full_steps": counts[name],
                "ideal": STEPS / counts[name],
                "speedup_transformer": transformer,
                "speedup_loop": loop,
                "share_transformer": transformer * counts[name] / STEPS,
                "share_transformer_quartiles": [low, high],
                "share_loop": loop * counts[name] / STEPS,
                "rounds": rounds,
            }
        )
    return rows


def rotated(items: list[T], places: int) -> list[T]:
    places %= len(items)
    return items[places:] + items[:places]


def moved(chosen: list[Method]) -> list[Method]:
    """Exchange the pipelines of all methods except cache-dit, whose patches stay in a pipeline."""
    free = rotated([pipeline for name, pipeline, _ in chosen if name != CACHE_DIT], 1)
    return [(name, pipeline if name == CACHE_DIT else free.pop(0), enabled) for name, pipeline, enabled in chosen]


def one_round(arguments: dict[str, Any], chosen: list[Method]) -> dict[str, Costs]:
    """A generation of each method, in turns with parts of a generation of the full sampler."""
    others = [name for name, *_ in chosen[1:]]
    edges = [STEPS * part // (len(others) + 1) for part in range(len(others) + 2)]
    parts = [(FULL_SAMPLER, end - start) for start, end in pairwise(edges)]
    turns = [turn for part, name in zip(parts, others, strict=False) for turn in (part, (name, STEPS))] + [parts[-1]]
    with ExitStack() as stack:
        calls = {name: stack.enter_context(timed_calls(pipeline)) for name, pipeline, _ in chosen}
        taken = take_turns({name: partial(generate, pipeline, arguments) for name, pipeline, _ in chosen}, turns)
    # the loop starts with the first call; what a pipeline prepares before that is not a denoising step
    for name, *_ in chosen:
        steps = taken[next(place for place, (other, _) in enumerate(turns) if other == name)]
        steps[0] = (calls[name][0][0], steps[0][1])
    full = [durations(calls[FULL_SAMPLER][start:end]) for start, end in pairwise(edges)]
    costs = {}
    for place, name in enumerate(others):
        around = full[place] + full[place + 1], durations(taken[2 * place] + taken[2 * place + 2])
        mine = durations(calls[name]), durations(taken[2 * place + 1])
        costs[name] = Costs(*(sum(a) / statistics.mean(b) for a, b in zip(mine, around, strict=True)))
    return costs


def generate(pipeline: FluxPipeline, arguments: dict[str, Any], step_done: Callable[[], None]) -> None:
    def at_end(_: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        step_done()
        return {}

    pipeline(**arguments, callback_on_step_end=at_end)


def durations(moments: list[Step]) -> list[float]:
    return [end - start for start, end in moments]


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
