"""``collect``: sample with a pipeline and keep the features of every step."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lesa.adapters.diffusers.recorder import Prompt, Recorder, prompt_list
from lesa.training.footprint import readable
from lesa.training.trajectories import Shard, Trajectories, load_shard, save_shard, shard_path


def collect(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    out: str | Path | None = None,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
    accelerator: Any = None,
    progress: bool = True,
    **options: Any,
) -> Trajectories:
    """Sample normally and keep the features that a predictor is trained on.

    A stream that takes part in some steps only (a second transformer, guidance that ends early) has features of these
    steps. The bytes of all calls are announced at the second step of the first one.

    Args:
        pipeline: a diffusers pipeline.
        prompts: one pipeline call each: a prompt, a list of prompts for a batch, or the keyword arguments of a call.
        seed: call i starts from a generator seeded with ``seed + i``, unless its arguments bring a generator.
        out: a folder with one safetensors file for each call. Existing files are not sampled again, so an interrupted
            run continues. None: keep everything in memory.
        tokens: keep only so many tokens of a feature: a random subset for each call, the same at all of its steps.
        dtype: of the kept features, such as ``torch.bfloat16``; None: as they are.
        accelerator: an ``accelerate.Accelerator`` whose processes share the calls; all of them must be able to read
            ``out``, and each returns all trajectories.
        progress: show a progress bar, and the bytes that will be kept.
        options: keyword arguments for every call, such as ``num_inference_steps=50``.

    Returns:
        The trajectories; memory-mapped from the folder, if there is one.

    Raises:
        ValueError: if there are no prompts, a file in ``out`` belongs to another request, a call ended early, or the
            disk has too little room.
    """
    recorder = Recorder(pipeline, prompts, seed, tokens, dtype, options)
    prompts = prompt_list(prompts)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    directory = None if out is None else Path(out)
    if directory is None and world > 1:
        raise ValueError("several processes collect into a folder that all of them can read: out=...")
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    mine = range(rank, len(prompts), world)
    missing = [i for i in mine if directory is None or not shard_path(directory, i).exists()]
    shards: dict[int, Shard] = {}

    def announce(size: int, shapes: str) -> None:
        place = "memory" if directory is None else str(directory)
        text = f"{len(missing)} calls with features {shapes}: {readable(len(missing) * size)} in {place}"
        if progress:
            tqdm.write(text)
        if directory is not None and len(missing) * size > shutil.disk_usage(directory).free:
            raise ValueError(
                f"{text}, where {readable(shutil.disk_usage(directory).free)} are free; tokens= keeps less"
            )

    recorder.on_start = announce
    for i in tqdm(mine, desc="collecting features", disable=not progress or rank > 0, delay=2):
        if directory is None:
            shards[i] = recorder.record(i)
        elif i in missing:
            shard = recorder.record(i)
            save_shard(shard_path(directory, i), recorder.times, shard, recorder.request(i), recorder.firsts)
        else:
            load_shard(shard_path(directory, i), recorder.request(i))  # refuses that of another request
    if directory is None:
        return Trajectories(recorder.times, list(shards.values()), recorder.firsts)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return Trajectories.of_files([shard_path(directory, i) for i in range(len(prompts))])
