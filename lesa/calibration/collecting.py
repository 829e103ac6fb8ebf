"""``collect``: run a pipeline on prompts and keep the feature of every step."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.calibration.trajectories import Shard, Stream, Trajectories, load_shard, save_shard, shard_path
from lesa.runtime.driver import Call
from lesa.runtime.observer import Observer

Prompt = str | list[str] | dict[str, Any]


def collect(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Trajectories:
    """Sample normally and keep the features that a predictor is trained on.

    Args:
        pipeline: a diffusers pipeline.
        prompts: one pipeline call each: a prompt, a list of prompts for a batch, or the keyword arguments of a call.
        seed: call i starts from a generator seeded with ``seed + i``, unless its arguments bring a generator.
        out: a folder for one safetensors file a call. What is there already is not sampled again, so an interrupted
            run goes on where it was. None: keep everything in memory.
        progress: show a progress bar.
        options: keyword arguments for every call, such as ``num_inference_steps=50``.

    Returns:
        The trajectories; memory-mapped if there is a folder.

    Raises:
        ValueError: if there are no prompts, a file in ``out`` belongs to another request, or a call ended early.
    """
    from lesa.adapters.diffusers import observe

    if not prompts:
        raise ValueError("no prompts to collect features on")
    directory = None if out is None else Path(out)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    recording = _Recording()
    with observe(pipeline, Observer(recording.add)):
        for i, prompt in enumerate(tqdm(prompts, desc="collecting features", disable=not progress, delay=2)):
            call = prompt if isinstance(prompt, dict) else {"prompt": prompt}
            call = {"generator": torch.Generator().manual_seed(seed + i), **options, **call}
            if directory is None:
                shards.append(recording.run(pipeline, call))
                continue
            path, request = shard_path(directory, i), _fingerprint(call)
            if path.exists():
                recording.times, shard = load_shard(path, request)
            else:
                save_shard(path, recording.times, recording.run(pipeline, call), request)
                _, shard = load_shard(path, request)
            shards.append(shard)
    return Trajectories(recording.times, shards)


class _Recording:
    """The features of one pipeline call, by stream."""

    def __init__(self) -> None:
        self.times = torch.empty(0)
        self._features: dict[Stream, Tensor] = {}
        self._steps: dict[Stream, int] = {}

    def add(self, call: Call, feature: Tensor) -> None:
        assert call.times is not None, "a pipeline knows its times"
        stream, steps = (call.component, call.branch), len(call.times) - 1
        if stream not in self._features:
            # [samples, steps, ...], so that a sample is one piece of memory
            self._features[stream] = feature.new_empty(len(feature), steps, *feature.shape[1:], device="cpu")
        self.times = call.times
        self._features[stream][:, call.step] = feature
        self._steps[stream] = self._steps.get(stream, 0) + 1

    def run(self, pipeline: Any, call: dict[str, Any]) -> Shard:
        self._features, self._steps = {}, {}
        pipeline(**call)
        steps = len(self.times) - 1
        if not self._features or any(count != steps for count in self._steps.values()):
            raise ValueError(f"only {self._steps} of {steps} steps ran; features are collected on whole generations")
        return self._features


def _fingerprint(value: Any) -> str:
    """The same for the same request, whatever the objects that say it."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part):
                digest.update(key.encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            digest.update(str(len(part)).encode())
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, torch.Generator):
            add(part.get_state())
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()[:16]
