"""Trajectories that are sampled when a training asks for them, and kept nowhere."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.calibration.recorder import Prompt, Recorder
from lesa.calibration.trajectories import Shard, Stream, choose_stream
from lesa.schedule import same_times


class LiveTrajectories:
    """For :func:`lesa.fit` in place of recorded trajectories: nothing touches the disk, at the price of sampling anew.

    Every epoch samples all prompts again, so fewer epochs and more prompts are the better use of it. Only the features
    of one batch are held in memory. A batch is made of whole calls, which the processes of an accelerator run side by
    side.

    Args:
        pipeline: a diffusers pipeline.
        prompts: one call each, as for :func:`lesa.collect`; all of them with as many samples.
        seed, tokens, dtype, options: as for :func:`lesa.collect`.

    Raises:
        ValueError: if there are no prompts. The first call is made at once, to learn its times and streams.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        tokens: int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self._recorder = Recorder(pipeline, prompts, seed, tokens, dtype, options)
        first = self._recorder.record(0)
        self.times = self._recorder.times
        self.streams = list(first)
        if any(features.shape[1] != self.num_steps for features in first.values()):
            raise ValueError("not every transformer or branch takes part in every step; lesa.collect can record these")
        self._samples = len(first[self.streams[0]])  # of every call
        self._nothing = {stream: features[:0].clone() for stream, features in first.items()}

    @property
    def samples(self) -> int:
        return len(self._recorder) * self._samples

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def stream(self, name: Stream | None = None) -> Stream:
        return choose_stream(self.streams, name)

    def digest(self, stream: Stream) -> str:
        """Names the features of a stream by the model and the calls that make them."""
        requests = [self._recorder.request(index) for index in range(len(self._recorder))]
        return hashlib.sha256(json.dumps([stream, requests], sort_keys=True).encode()).hexdigest()

    def num_batches(self, size: int) -> int:
        """How many :meth:`batches` of this size there are; samples nothing."""
        return math.ceil(len(self._recorder) / self._calls(size))

    def batches(
        self,
        size: int,
        *,
        stream: Stream | None = None,
        seed: int | None = None,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Tensor]:
        """Features [samples, steps, *feature] of all calls, as many calls in a batch as make ``size`` samples.

        In random order if a seed is given. The first ``skip`` batches of that order are not sampled. With ``part``
        (i, n) only every n-th call of a batch from the i-th on is made, which may be none.

        Raises:
            ValueError: if a call has other times or another number of samples than the first.
        """
        chosen, count = self.stream(stream), len(self._recorder)
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for calls in order.split(self._calls(size))[skip:]:
            mine = calls[part[0] :: part[1]].tolist()
            yield torch.cat([self._sample(index)[chosen] for index in mine] or [self._nothing[chosen]])

    def _calls(self, size: int) -> int:
        return max(1, size // self._samples)

    def _sample(self, index: int) -> Shard:
        shard = self._recorder.record(index)
        samples = len(shard[self.streams[0]])
        if samples != self._samples or not same_times(self._recorder.times, self.times):
            raise ValueError(
                f"call {index} made {samples} samples in {len(self._recorder.times) - 1} steps, the first "
                f"{self._samples} in {self.num_steps}; live calls must be alike"
            )
        return shard
