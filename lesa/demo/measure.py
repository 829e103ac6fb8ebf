"""Quality and speed of methods against the full sampler, on seeds that no predictor has seen."""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from lesa.demo.digits import NUM_CLASSES, agreement
from lesa.demo.methods import NUM_STEPS, Method
from lesa.demo.model import request, unpack

IMAGE_RANGE = 2.0  # from -1 to 1


def labels_of(seeds: range) -> Tensor:
    """The digit that each seed is asked for."""
    return torch.tensor(seeds) % NUM_CLASSES


def compare(
    pipeline: FluxPipeline,
    methods: list[Method],
    seeds: range,
    *,
    batch: int,
    timing_rounds: int,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row for each method; the first is the full sampler.

    Images are clamped to [-1, 1]; PSNR and SSIM (7 x 7 windows) are means of the per-image values against the full
    sampler's image of the same seed. Speed-ups are medians over rounds in which all methods take turns.
    """
    batches = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    rounds = [*batches, *itertools.islice(itertools.cycle(batches), max(0, timing_rounds - len(batches)))]
    images: dict[Method, list[Tensor]] = defaultdict(list)
    seconds: dict[Method, list[float]] = defaultdict(list)
    runs, kept = {}, {}
    with tqdm(total=len(rounds) * len(methods), desc="comparing", disable=not progress, delay=2) as bar:
        for number, chosen in enumerate(rounds):
            for method in methods:
                bar.update()
                if not method.timed and number >= len(batches):
                    continue
                with method.enabled(pipeline) as handle, count_full_steps(pipeline) as full:
                    image, elapsed = timed(pipeline, chosen)
                seconds[method].append(elapsed)
                if number < len(batches):
                    images[method].append(image)
                    runs[method] = len(full)
                    kept[method] = sum(r.kept_bytes for r in handle.records) if handle else None
    single = single_image_seconds(pipeline, methods, rounds=2 * timing_rounds + 1, progress=progress)
    full_images = torch.cat(images[methods[0]])
    rows = []
    for method in methods:
        quality = scores(torch.cat(images[method]), full_images, labels_of(seeds))
        rows.append(
            {
                "method": method.name,
                "plan": method.plan,
                "full_steps": runs[method],
                "speedup_ideal": NUM_STEPS / runs[method],
                "speedup_wall": speedup(seconds[methods[0]], seconds[method]),
                "speedup_wall_batch_1": speedup(single[methods[0]], single[method]),
                **quality,
                "kept_bytes": kept[method],
                "seconds": statistics.median(seconds[method]),
                "samples": len(seeds),
                "batch": batch,
            }
        )
    return rows


def timed(pipeline: FluxPipeline, seeds: range) -> tuple[Tensor, float]:
    """The clamped images of one call and the seconds of its denoising loop."""
    arguments = request(labels_of(seeds).tolist(), seeds, num_steps=NUM_STEPS)
    start = time.perf_counter()
    tokens = pipeline(**arguments).images  # without text encoders and VAE the call is the denoising loop
    return unpack(tokens).clamp(-1, 1), time.perf_counter() - start


def single_image_seconds(
    pipeline: FluxPipeline, methods: list[Method], *, rounds: int, progress: bool
) -> dict[Method, list[float]]:
    """Seconds of each method for one image, all methods taking turns."""
    result: dict[Method, list[float]] = defaultdict(list)
    for seed in tqdm(range(rounds), desc="timing single images", disable=not progress, delay=2):
        for method in methods:
            with method.enabled(pipeline):
                timed(pipeline, range(1))  # what happens once a schedule, such as folding a table, is not the image's
                result[method].append(timed(pipeline, range(seed, seed + 1))[1])
    return result


def speedup(full: list[float], method: list[float]) -> float:
    """Median ratio of the times of the same round."""
    return statistics.median(a / b for a, b in zip(full, method, strict=False))


def scores(images: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Quality of images [N, 1, 8, 8] in [-1, 1] against the full sampler's."""
    same = torch.equal(images, reference)
    psnr = peak_signal_noise_ratio(images, reference, data_range=IMAGE_RANGE, dim=(1, 2, 3), reduction="none")
    ssim: Any = structural_similarity_index_measure(
        images, reference, gaussian_kernel=False, kernel_size=7, data_range=IMAGE_RANGE
    )
    return {
        "psnr": None if same else float(psnr.mean()),  # infinite, which JSON does not know
        "ssim": float(ssim),
        "classifier_agreement": agreement(images, labels),
    }


@contextmanager
def count_full_steps(pipeline: FluxPipeline, block: int = 0) -> Iterator[list[None]]:
    """A list that grows whenever this block really runs, whoever decides on that."""
    runs: list[None] = []
    handle = pipeline.transformer.transformer_blocks[block].attn.register_forward_pre_hook(lambda *_: runs.append(None))
    try:
        yield runs
    finally:
        handle.remove()


def error_along_the_way(pipeline: FluxPipeline, methods: list[Method], seeds: range) -> dict[str, list[float]]:
    """For each method the root mean squared difference of its latents from the full sampler's after every step."""
    paths = {}
    for method in methods:
        latents: list[Tensor] = []

        def record(
            _: Any, step: int, time: Any, state: dict[str, Tensor], into: list[Tensor] = latents
        ) -> dict[str, Any]:
            into.append(state["latents"])
            return {}

        with method.enabled(pipeline):
            arguments = request(labels_of(seeds).tolist(), seeds, num_steps=NUM_STEPS)
            pipeline(**arguments, callback_on_step_end=record)
        paths[method.name] = torch.stack(latents)
    full = next(iter(paths.values()))
    return {name: (path - full).square().mean(dim=(1, 2, 3)).sqrt().tolist() for name, path in paths.items()}
