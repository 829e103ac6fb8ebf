"""The true features of whole generations, for training: in memory, or in memory-mapped safetensors files."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.runtime.driver import Stream
from lesa.schedule import as_times, same_times

Shard = Mapping[Stream, Tensor]  # the features [samples, steps, *feature] of one batch of samples


class Source(Protocol):
    """Where a training takes features [samples, steps, *feature] from: a record, or the running model."""

    streams: list[Stream]
    times: Tensor

    @property
    def samples(self) -> int: ...

    @property
    def num_steps(self) -> int: ...

    def stream(self, name: Stream | None = None) -> Stream: ...

    def num_batches(self, size: int) -> int: ...

    def batches(
        self,
        size: int,
        *,
        stream: Stream | None = None,
        seed: int | None = None,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Tensor]:
        """All samples, in batches of up to ``size``; of each batch the samples of process part[0] of part[1]."""
        ...


class Trajectories:
    """Features [samples, steps, *feature] of each stream, and the times they belong to.

    Args:
        times: the schedule, one noise level a step and optionally the final one.
        shards: features by stream, one mapping for each batch of samples; shapes may differ between batches.

    Raises:
        ValueError: if there is nothing in them, the shards disagree, or the times are not those of their steps.
    """

    def __init__(self, times: Tensor, shards: list[Shard]) -> None:
        if not shards or not shards[0]:
            raise ValueError("there is nothing in these trajectories: no feature was recorded")
        self.streams = list(shards[0])
        self.shards = shards
        self.times = as_times(times, shards[0][self.streams[0]].shape[1])
        for shard in shards:
            if list(shard) != self.streams:
                raise ValueError(f"one batch recorded {list(shard)}, another {self.streams}")
            sizes = {features.shape[:2] for features in shard.values()}
            if len(sizes) > 1 or next(iter(sizes))[1] != self.num_steps:
                raise ValueError(f"streams of one batch must agree on [samples, {self.num_steps} steps]: {sizes}")

    @classmethod
    def load(cls, directory: str | Path) -> "Trajectories":
        """The files of a folder, memory-mapped: only what is looked at is read.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if one was cut short, or two belong to different schedules.
        """
        paths = sorted(Path(directory).glob("trajectories-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no trajectories in {directory}")
        times, shards = zip(*(load_shard(path) for path in paths), strict=True)
        for path, other in zip(paths, times, strict=True):
            if not same_times(times[0], other):
                raise ValueError(f"{path} was recorded on another schedule than {paths[0]}")
        return cls(times[0], list(shards))

    @property
    def samples(self) -> int:
        return sum(len(shard[self.streams[0]]) for shard in self.shards)

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def stream(self, name: Stream | None = None) -> Stream:
        """The stream asked for, or the only one there is.

        Raises:
            ValueError: if it was not recorded, or none was asked for where there are several.
        """
        return choose_stream(self.streams, name)

    def num_batches(self, size: int) -> int:
        """How many :meth:`batches` of this size there are; reads nothing."""
        return sum(math.ceil(len(shard[self.streams[0]]) / size) for shard in self.shards)

    def batches(
        self,
        size: int,
        *,
        stream: Stream | None = None,
        seed: int | None = None,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Tensor]:
        """Features [up to size, steps, *feature] of all samples; in random order if a seed is given.

        The first ``skip`` batches of that order are left out without being read. With ``part`` (i, n) only every n-th
        sample of a batch from the i-th on is read: what process i of n works on, which may be none.
        """
        chosen = self.stream(stream)
        generator = torch.Generator().manual_seed(seed or 0)

        def order(count: int) -> Tensor:
            return torch.arange(count) if seed is None else torch.randperm(count, generator=generator)

        members = [(shard[chosen], batch) for shard in self.shards for batch in order(len(shard[chosen])).split(size)]
        for i in order(len(members)).tolist()[skip:]:
            features, batch = members[i]
            yield features[batch[part[0] :: part[1]]]


def choose_stream(streams: list[Stream], name: Stream | None) -> Stream:
    """The one asked for, or the only one there is; a ValueError if there is no such, or no choice was made."""
    if name is None and len(streams) > 1:
        raise ValueError(f"choose one of the recorded streams {streams}: stream=...")
    if name is not None and name not in streams:
        raise ValueError(f"{name} was not recorded; there are {streams}")
    return streams[0] if name is None else name


def shard_path(directory: Path, index: int) -> Path:
    """The file of the index-th batch."""
    return directory / f"trajectories-{index:05d}.safetensors"


def save_shard(path: Path, times: Tensor, shard: Shard, request: str = "") -> None:
    """Write one batch of samples; a file that exists is a whole one. ``request`` names what it was made for."""
    tensors = {str(i): features.contiguous() for i, features in enumerate(shard.values())}
    metadata = {"times": json.dumps(times.tolist()), "streams": json.dumps(list(shard)), "request": request}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, str(unfinished), metadata)
    unfinished.replace(path)


def load_shard(path: Path, request: str | None = None) -> tuple[Tensor, Shard]:
    """Times and memory-mapped features of one file.

    Raises:
        ValueError: if the file was cut short, is something else, or was made for another request than the given one.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
            if request not in (None, metadata["request"]):
                raise ValueError(f"{path} was collected for other prompts, seeds or options; choose another folder")
            times = torch.tensor(json.loads(metadata["times"]), dtype=torch.float64)
            streams = [(component, branch) for component, branch in json.loads(metadata["streams"])]
            return times, {stream: file.get_tensor(str(i)) for i, stream in enumerate(streams)}
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a complete trajectory file ({error}); remove it and collect again") from error
