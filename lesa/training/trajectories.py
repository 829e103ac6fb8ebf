"""The true features of whole generations, for training: in memory, or in memory-mapped safetensors files."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.files import TensorFile, read_tensors, write_tensors
from lesa.files.tensors import FLOATS, damaged
from lesa.tables.forecaster import Stream
from lesa.tables.times import as_times, same_times

KIND = "trajectory"
ADVICE = "remove it and collect again"
Shard = Mapping[Stream, Tensor]  # the features [samples, steps, *feature] of one batch of samples


class Trajectories:
    """Features [samples, steps, *feature] of each stream, and the times they belong to.

    Args:
        times: the schedule, one noise level a step and optionally the final one.
        shards: features by stream, one mapping for each batch of samples; shapes may differ between batches.
        firsts: the first step of each stream that takes part in some steps of the schedule only, such as a second
            transformer; 0 for others.

    Raises:
        ValueError: if there is nothing in them, the shards disagree, or the times are not those of their steps.
    """

    def __init__(self, times: Tensor, shards: list[Shard], firsts: Mapping[Stream, int] | None = None) -> None:
        if not shards or not shards[0]:
            raise ValueError("there is nothing in these trajectories: no feature was recorded")
        self.streams = list(shards[0])
        self.shards = shards
        self.firsts = {stream: (firsts or {}).get(stream, 0) for stream in self.streams}
        ends = {stream: first + shards[0][stream].shape[1] for stream, first in self.firsts.items()}
        self.times = as_times(times, max(ends.values()))
        for shard in shards:
            if list(shard) != self.streams:
                raise ValueError(f"one batch recorded {list(shard)}, another {self.streams}")
            samples = {len(features) for features in shard.values()}
            steps = {stream: first + shard[stream].shape[1] for stream, first in self.firsts.items()}
            if len(samples) > 1 or steps != ends or max(ends.values()) != self.num_steps:
                sizes = {tuple(features.shape[:2]) for features in shard.values()}
                raise ValueError(f"streams of one batch must agree on [samples, {self.num_steps} steps]: {sizes}")

    @classmethod
    def load(cls, directory: str | Path) -> "Trajectories":
        """The files of a folder, memory-mapped: only what is used is read.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if one was cut short, or two belong to different schedules.
        """
        paths = sorted(Path(directory).glob("trajectories-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no trajectories in {directory}")
        return cls.of_files(paths)

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> "Trajectories":
        """:meth:`load` of these files."""
        times, shards, firsts = zip(*(load_shard(path) for path in paths), strict=True)
        for path, other, steps in zip(paths, times, firsts, strict=True):
            if not same_times(times[0], other) or steps != firsts[0]:
                raise ValueError(f"{path} was recorded on another schedule than {paths[0]}")
        return cls(times[0], list(shards), firsts[0])

    def of(self, stream: Stream) -> "Trajectories":
        """The trajectories of one stream, on the steps that it takes part in."""
        first = self.firsts[stream]
        count = self.shards[0][stream].shape[1]
        return Trajectories(self.times[first : first + count + 1], [{stream: shard[stream]} for shard in self.shards])

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
        if name is None and len(self.streams) > 1:
            raise ValueError(f"choose one of the recorded streams {self.streams}: stream=...")
        if name is not None and name not in self.streams:
            raise ValueError(f"{name} was not recorded; there are {self.streams}")
        return self.streams[0] if name is None else name

    def digest(self, stream: Stream) -> str:
        """A hash of a few numbers of each feature of a stream, so that little of a file is read."""
        digest = hashlib.sha256(repr(self.times.tolist()).encode())
        for shard in self.shards:
            features = shard[stream]
            few = features.flatten(2)[:, :, :: max(1, features[0, 0].numel() // 7)]
            digest.update(f"{list(features.shape)} {features.dtype}".encode())
            digest.update(few.double().contiguous().numpy().tobytes())
        return digest.hexdigest()

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

        The first ``skip`` batches of that order are skipped without being read. With ``part`` (i, n) only every n-th
        sample of a batch from the i-th on is read, for process i of n; that may be none.
        """
        chosen = self.stream(stream)
        generator = torch.Generator().manual_seed(seed or 0)

        def order(count: int) -> Tensor:
            return torch.arange(count) if seed is None else torch.randperm(count, generator=generator)

        members = [(shard[chosen], batch) for shard in self.shards for batch in order(len(shard[chosen])).split(size)]
        for i in order(len(members)).tolist()[skip:]:
            features, batch = members[i]
            yield features[batch[part[0] :: part[1]]]


def shard_path(directory: Path, index: int) -> Path:
    """The file of the index-th batch."""
    return directory / f"trajectories-{index:05d}.safetensors"


def save_shard(
    path: Path, times: Tensor, shard: Shard, request: Any = None, firsts: Mapping[Stream, int] | None = None
) -> None:
    """Write one batch of samples; ``request`` says what it was made for."""
    tensors = {str(i): features for i, features in enumerate(shard.values())}
    description = {"times": times.tolist(), "streams": [list(stream) for stream in shard], "request": request}
    if firsts is not None and any(firsts.values()):
        description["firsts"] = [firsts.get(stream, 0) for stream in shard]
    write_tensors(path, tensors, description, kind=KIND)


def load_shard(path: Path, request: Any = None) -> tuple[Tensor, Shard, dict[Stream, int]]:
    """Times and memory-mapped features of one file, and the first step of each stream.

    Raises:
        ValueError: if the file was cut short, is something else, or was made for another request than the given one.
    """
    file = read_tensors(path, kind=KIND, advice=ADVICE, mapped=True)
    try:
        times, shard, firsts, made_for = _understand(file)
    except ValueError as error:
        raise ValueError(damaged(path, KIND, error, ADVICE)) from error
    if request is not None and made_for != request:
        named = isinstance(request, dict) and isinstance(made_for, dict)
        other = [name for name in request if made_for.get(name) != request[name]] if named else []
        what = " and ".join(other) or "prompts, seeds or options"
        raise ValueError(f"{path} was collected for other {what}; choose another folder")
    return times, shard, firsts


def _understand(file: TensorFile) -> tuple[Tensor, Shard, dict[Stream, int], Any]:
    description = file.description
    if not isinstance(description, dict):
        raise ValueError("it does not say what it holds")
    numbers, names = description.get("times"), description.get("streams")
    if not isinstance(numbers, list) or not isinstance(names, list) or not names:
        raise ValueError("it has no times or no streams")
    times = as_times([real("a time", number) for number in numbers], len(numbers) - 1)
    if not all(isinstance(n, list) and len(n) == 2 and all(isinstance(part, str) for part in n) for n in names):
        raise ValueError("its streams are not pairs of a component and a branch")
    streams = [(component, branch) for component, branch in names]
    if len(set(streams)) != len(streams) or sorted(file.tensors) != sorted(map(str, range(len(streams)))):
        raise ValueError("it does not hold one tensor for each stream")
    shard = {stream: file.tensors[str(i)] for i, stream in enumerate(streams)}
    begun = description.get("firsts", [0] * len(streams))
    if not isinstance(begun, list) or len(begun) != len(streams):
        raise ValueError("it does not say where each stream begins")
    firsts = {s: whole("a first step", step, least=0, most=len(times)) for s, step in zip(streams, begun, strict=True)}
    for stream, features in shard.items():
        fits = features.ndim >= 3 and 0 < features.shape[1] <= len(times) - 1 - firsts[stream] and features.numel()
        if not fits or features.dtype not in FLOATS:
            raise ValueError(
                f"{'.'.join(stream):.80} is {features.dtype} {list(features.shape)}, not numbers [samples, up to "
                f"{len(times) - 1 - firsts[stream]} steps, ...] of 16, 32 or 64 bits"
            )
    if max(first + shard[stream].shape[1] for stream, first in firsts.items()) != len(times) - 1:
        raise ValueError(f"no stream takes part in the last of its {len(times) - 1} steps")
    return times, shard, firsts, description.get("request")
