"""Our forecasters in cache-dit compared with its calibrators: quality, time and memory of a predicted step.

    python -m benchmarks.cache_dit --out benchmarks/results/cache_dit.json

Two models: the trained demo model for quality, and a wider FLUX with random weights, whose features are large enough
for measurements. cache-dit runs the first block at every step and the others at the full steps of a mask. A calibrator
predicts the change by the other blocks, for image and text tokens. All methods take turns in one process.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cache_dit
import torch
from cache_dit.caching.cache_contexts.calibrators import CalibratorBase
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

import lesa
from benchmarks.census import Census, census
from benchmarks.demo.loop import timed_calls
from lesa.adapters.cache_dit import ForecasterConfig, steps_mask
from lesa.demo.model import labels_of, load_pipeline, request, unpack
from lesa.reports.environment import describe_environment

THEIRS: dict[str, Callable[[], Any]] = {
    "no calibrator": lambda: None,
    "TaylorSeer 1": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    "TaylorSeer 2": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
    "FoCa": cache_dit.FoCaCalibratorConfig,
    "DMD": cache_dit.DMDCalibratorConfig,
}
OURS: dict[str, lesa.Forecaster] = {
    "Reuse": lesa.Reuse(),
    "Taylor 1": lesa.Taylor(1),
    "Taylor 2": lesa.Taylor(2),
    "Hermite 2": lesa.Hermite(2),
    "FoCa": lesa.FoCa(),
}


@dataclass(frozen=True)
class Model:
    """A model to measure on.

    Attributes:
        load: makes a pipeline; every method gets a new one, since cache-dit patches it.
        call: the arguments of a round, by its number.
        rounds: timed rounds; one more warms up.
        image: converts the tokens of a result to an image in [-1, 1]; None: quality is not measured.
    """

    name: str
    load: Callable[[], FluxPipeline]
    plan: lesa.StepPlan
    call: Callable[[int], dict[str, Any]]
    rounds: int
    image: Callable[[Tensor], Tensor] | None


@dataclass
class Calls:
    """Time and memory of the calls of ``approximate`` in one generation."""

    seconds: list[float] = field(default_factory=list)
    censuses: list[Census] = field(default_factory=list)
    feature_bytes: int = 0
    kept_bytes: int = 0


def demo(batch: int, rounds: int) -> Model:
    """The trained demo model; each round draws other digits."""

    def call(number: int) -> dict[str, Any]:
        seeds = range(number * batch, (number + 1) * batch)
        return request(labels_of(seeds).tolist(), seeds, num_steps=50)

    plan = lesa.StepPlan.paper(50, interval=7)
    return Model("demo", load_pipeline, plan, call, rounds, lambda tokens: unpack(tokens).clamp(-1, 1))


def wide(rounds: int) -> Model:
    """FLUX with two blocks of width 512 on 1024 tokens, random weights."""

    def load() -> FluxPipeline:
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        without = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipeline = FluxPipeline(scheduler=scheduler, transformer=transformer.eval(), **without)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def call(number: int) -> dict[str, Any]:
        prompt = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(number))
        return {
            "prompt_embeds": prompt,
            "pooled_prompt_embeds": prompt[:, 0],
            "height": 512,
            "width": 512,
            "num_inference_steps": 12,
            "generator": torch.Generator().manual_seed(number),
            "output_type": "latent",
        }

    return Model("wide FLUX, random weights", load, lesa.StepPlan.paper(12, interval=4), call, rounds, None)


@contextmanager
def enabled(pipeline: FluxPipeline, plan: lesa.StepPlan, calibrator: Any) -> Iterator[None]:
    """cache-dit with a calibrator and the full steps of the plan."""
    cache_dit.enable_cache(
        pipeline,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            steps_computation_mask=steps_mask(plan),
            steps_computation_policy="static",
        ),
        calibrator_config=calibrator,
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(pipeline)


@contextmanager
def watched(*, count_after: int | None = None) -> Iterator[Calls]:
    """Time all calls of ``approximate``; after the first ``count_after`` calls also count operators and bytes."""
    calls = Calls()
    originals = {kind: kind.approximate for kind in CalibratorBase.__subclasses__()}

    def watch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def approximate(self: Any, name: str = "default") -> Tensor:
            if count_after is not None and len(calls.seconds) >= count_after:
                calls.kept_bytes = max(calls.kept_bytes, sum(storages(self).values()))
                calls.censuses.append(census(lambda: original(self, name=name)))
            start = time.perf_counter()
            result = original(self, name=name)
            calls.seconds.append(time.perf_counter() - start)
            calls.feature_bytes = max(calls.feature_bytes, result.nbytes)
            return result

        return approximate

    for kind, original in originals.items():
        kind.approximate = watch(original)
    try:
        yield calls
    finally:
        for kind, original in originals.items():
            kind.approximate = original


def storages(thing: Any, seen: set[int] | None = None) -> dict[int, int]:
    """The sizes in bytes of all tensor storages that a calibrator refers to, by address."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (lesa.StepPlan, str, int, float)) or callable(thing):
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    found: dict[int, int] = {}
    for item in (*inside, *vars(thing).values()) if hasattr(thing, "__dict__") else inside:
        found |= storages(item, seen)
    return found


def measure(model: Model) -> list[dict[str, Any]]:
    """A row for each method."""
    methods: dict[tuple[str, str], Callable[[FluxPipeline], Any]] = {
        ("cache-dit", name): lambda _, make=make: make() for name, make in THEIRS.items()
    }
    methods |= {
        ("lesa", name): lambda pipeline, forecaster=forecaster: ForecasterConfig(forecaster, pipeline)
        for name, forecaster in OURS.items()
    }
    full, pipelines = model.load(), {method: model.load() for method in methods}
    psnr: dict[Any, list[float]] = defaultdict(list)
    seconds: dict[Any, list[float]] = defaultdict(list)
    whole: dict[Any, list[float]] = defaultdict(list)
    for number in tqdm(range(model.rounds + 1), desc=model.name, delay=2):
        expected = None if model.image is None else model.image(full(**model.call(number)).images)
        for method, make in methods.items():
            pipeline = pipelines[method]
            cache = enabled(pipeline, model.plan, make(pipeline))
            with cache, watched() as calls, timed_calls(pipeline) as steps:
                tokens = pipeline(**model.call(number)).images
            if model.image is not None and expected is not None:
                image = model.image(tokens)
                psnr[method] += peak_signal_noise_ratio(
                    image, expected, data_range=2.0, dim=(1, 2, 3), reduction="none"
                ).tolist()
            if number > 0:
                seconds[method] += calls.seconds
                whole[method] += [end - start for start, end in map(steps.__getitem__, model.plan.predicted_steps)]
    rows = []
    streams = 2  # a predicted step makes one call for image tokens and one for text tokens
    for (by, name), make in methods.items():
        pipeline, earlier = pipelines[by, name], streams * (len(model.plan.predicted_steps) - 1)
        with enabled(pipeline, model.plan, make(pipeline)), watched(count_after=earlier) as calls:
            pipeline(**model.call(0))
        # the last step, when histories are full, for the image tokens, which are the largest stream
        last = max(calls.censuses, key=lambda c: c.allocated, default=None)
        per_step = [sum(pair) for pair in zip(*[iter(seconds[by, name])] * streams, strict=True)]
        rows.append(
            {
                "model": model.name,
                "by": by,
                "method": name,
                "full_steps": len(model.plan.full_steps),
                "steps": model.plan.num_steps,
                "psnr": statistics.mean(psnr[by, name]) if model.image else None,
                "images": len(psnr[by, name]),
                "feature_bytes": calls.feature_bytes,
                "ms": statistics.median(per_step) * 1e3 if per_step else None,
                "ms_whole_step": statistics.median(whole[by, name]) * 1e3,
                "operators": last.operators if last else None,
                "allocated_features": last.allocated / calls.feature_bytes if last else None,
                "kept_features": calls.kept_bytes / calls.feature_bytes if last else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=48, help="digits in a round of the demo model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each model (%(default)s)")
    options = parser.parse_args()
    environment = describe_environment(["torch", "diffusers", "cache-dit"])
    rows = [row for model in (demo(options.batch, options.rounds), wide(options.rounds)) for row in measure(model)]
    for row in rows:
        quality = "" if row["psnr"] is None else f"{row['psnr']:6.2f} dB "
        cost = "" if row["ms"] is None else f"{row['ms']:7.3f} ms {row['operators']:4d} operators "
        cost = f"{row['ms_whole_step']:7.3f} ms {cost}"
        memory = (
            "" if row["ms"] is None else f"{row['allocated_features']:.1f} allocated {row['kept_features']:.1f} kept"
        )
        print(f"{row['model']:26s} {row['by']:10s} {row['method']:18s} {quality}{cost}{memory}")
    if options.out is not None:
        options.out.write_text(json.dumps([row | {"environment": environment} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
