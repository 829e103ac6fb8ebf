"""Quality and speed of methods against the full sampler, on held-out digits."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lesa.demo.model import call_of, digit_metric, images_of
from lesa.evaluation.evaluate import Row, evaluate
from lesa.evaluation.methods import Method


def compare(
    pipeline: FluxPipeline,
    methods: list[Method],
    seeds: range,
    *,
    batch: int,
    timing_rounds: int,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    progress: bool = True,
) -> list[Row]:
    """A row for each method, the full sampler first, with times of whole batches and of single images.

    ``keep`` is called with the rows so far after every call of the pipeline.
    """
    batches = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    rows = evaluate(
        pipeline,
        methods,
        [call_of(part) for part in batches],
        metrics=["psnr", "ssim", digit_metric],
        images=images_of,
        rounds=max(1, timing_rounds // len(batches)),
        keep=keep,
        progress=progress,
    )
    single = evaluate(
        pipeline,
        methods,
        [call_of(range(seed, seed + 1)) for seed in range(2 * timing_rounds + 1)],
        metrics=[],
        images=images_of,
        warm_up=True,  # exclude the work that is done once for a schedule
        keep=lambda single: keep(beside(rows, single, batch)),
        progress=progress,
    )
    return beside(rows, single, batch)


def beside(rows: list[Row], single: list[Row], batch: int) -> list[Row]:
    """Add the times of single images to the rows of whole batches."""
    return [
        row | {"speedup_wall_batch_1": alone["speedup_wall"], "batch": batch}
        for row, alone in zip(rows, single, strict=True)
    ]


def error_along_the_way(pipeline: FluxPipeline, methods: list[Method], seeds: range) -> dict[str, list[float]]:
    """For each method the RMS difference of its latents from those of the full sampler after every step."""
    paths = {}
    for method in methods:
        latents: list[Tensor] = []

        def record(
            _: Any, step: int, time: Any, state: dict[str, Tensor], into: list[Tensor] = latents
        ) -> dict[str, Any]:
            into.append(state["latents"])
            return {}

        with method.enabled(pipeline):
            pipeline(**call_of(seeds), callback_on_step_end=record)
        paths[method.name] = torch.stack(latents)
    full = next(iter(paths.values()))
    return {name: (path - full).square().mean(dim=(1, 2, 3)).sqrt().tolist() for name, path in paths.items()}
