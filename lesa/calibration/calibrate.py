"""``calibrate``: sample normally, measure statistics of the features, find the best plan for every budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.adapters.diffusers.pipeline import describe_model, weights_digest
from lesa.adapters.diffusers.recorder import Prompt, Recorder, prompt_list
from lesa.calibration.calibration import Calibration
from lesa.calibration.measured import Measured
from lesa.calibration.storing import file_of
from lesa.files import locked
from lesa.runtime.driver import Call
from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import LinearHead, measure_output_errors
from lesa.tables.forecaster import Stream
from lesa.tables.times import same_times

TOKENS = 1024  # of a feature; FLUX at 1024 x 1024 has 4096
MEASURED = 50  # steps at most; between them, statistics are interpolated


def calibrate(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    tokens: int | None = TOKENS,
    out: str | Path | None = None,
    search: bool = True,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Measure what plans and forecasters for any budget need, while the pipeline samples normally.

    Features are dropped at the end of each call. On the demo model four samples give plans and tables within 1 dB of
    those of 96 samples.

    A schedule may be fine: with 200 steps the calibration knows the exact path of the sampler, which
    ``enable(..., evaluations=10)`` then comes near. Of more than 50 steps, 50 are measured.

    Args:
        pipeline: a diffusers pipeline.
        prompts: one call each: a prompt, a list of prompts for a batch, or the keyword arguments of a call.
        seed: call i starts from a generator seeded with ``seed + i``, unless its arguments bring a generator.
        tokens: how many tokens of each feature are used, a random subset for each call; None: all. ``token_error`` of
            the calibration says how good the subset is.
        out: a file or folder that the calibration is saved to after each call. If it exists, calls that it holds are
            not made again.
        search: find the best plan for every budget at the end, 10 s on 2 cores for 50 steps; otherwise each plan is
            searched when it is first used.
        progress: show progress bars.
        options: keyword arguments for every call, such as ``num_inference_steps=50`` and the guidance scale.

    Returns:
        The calibration, for :func:`lesa.enable`.

    Raises:
        ValueError: if there are no prompts, a call ends early or has another schedule than the first, a feature is not
            finite, or what is in ``out`` was made for something else.
    """
    prompts = prompt_list(prompts)
    path = None if out is None else file_of(out)
    recorder = _CalibrationRecorder(pipeline, prompts, seed, tokens, None, options)
    if path is not None and path.exists():
        recorder.take_over(Calibration.load(path), path)
    for i in tqdm(range(len(prompts)), desc="calibrating", disable=not progress, delay=2):
        name = recorder.name(i)
        if recorder.calibration is not None and name in recorder.calibration.requests:
            continue
        recorder.record(i)
        recorder.count(name, path)
    result = recorder.result
    if search and not result.plans:
        result.search(progress=progress)
        if path is not None:
            with locked(path):
                _save_unless_older(result, path)
    return result


def _save_unless_older(calibration: Calibration, path: Path) -> None:
    """Write the plans that were found, unless another process has added calls meanwhile."""
    if not path.exists() or set(Calibration.load(path).requests) <= set(calibration.requests):
        calibration.save(path)


class _CalibrationRecorder(Recorder):
    """A recorder that keeps the statistics of a call in place of its features."""

    def __init__(self, pipeline: Any, *arguments: Any) -> None:
        super().__init__(pipeline, *arguments)
        self.model = describe_model(pipeline)
        self.calibration: Calibration | None = None
        self._calls: dict[Stream, _StreamOfCall] = {}
        self._measured: list[int] = []  # the steps of this call whose features are used

    @property
    def result(self) -> Calibration:
        assert self.calibration is not None, "nothing was recorded"
        return self.calibration

    def record(self, index: int) -> Any:
        self._calls, self._measured = {}, []
        return super().record(index)

    def take_over(self, calibration: Calibration, path: Path) -> None:
        """Continue an existing calibration; a ValueError names what differs: the model, or other settings."""
        calibration.check_model(self.model)
        mine = self._settings
        theirs = {name: value for name, value in calibration.settings.items() if name != "feature"}
        other = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
        if other:
            raise ValueError(
                f"{path} was calibrated with other {' and '.join(other)}; go on so, or choose another out="
            )
        self.calibration = calibration

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The settings that a calibration depends on; computed once, since it reads a few numbers of each weight."""
        return {"tokens": self._tokens, "weights": weights_digest(self._pipeline), **_plain(self._options)}

    def count(self, name: str, path: Path | None) -> None:
        """Add the recorded call to the calibration and to its file, which other processes may write as well."""
        call = self._of_call(name)
        if path is None:
            self._add_call(call)
            return
        with locked(path):
            if path.exists():
                self.take_over(Calibration.load(path), path)
            if self.calibration is None or name not in self.calibration.requests:
                self._add_call(call)
            self.result.save(path)

    def _add_call(self, call: Calibration) -> None:
        if self.calibration is None:
            self.calibration = call
            return
        mine, theirs = (c.settings.get("feature") for c in (self.calibration, call))
        if mine != theirs:
            raise ValueError(
                f"this call has features {theirs}, those before it {mine}: another resolution, to calibrate on its own"
            )
        self.calibration.merge(call)

    def _of_call(self, name: str) -> Calibration:
        return Calibration(
            self.times,
            {stream: part.measured() for stream, part in self._calls.items()},
            self.model,
            {"feature": {".".join(s): list(part.shape[1:]) for s, part in self._calls.items()}, **self._settings},
            [name],
            next(iter(self._calls.values())).shape[0],
            max(part.token_error for part in self._calls.values()),
        )

    def _add(self, call: Call, feature: Tensor) -> None:
        assert call.times is not None, "a pipeline knows its times"
        self.times, stream = call.times, (call.component, call.branch)
        self._note(stream, call.step)
        self._features[stream] = feature.new_empty(0)
        self._measured = self._measured or _spread(call.step, len(call.times) - 1)
        if call.step not in self._measured:
            return
        if stream not in self._calls:
            self._calls[stream] = _StreamOfCall(self._measured.index(call.step), feature.shape)
        self._calls[stream].add(call, feature, self._subset(feature))

    def _whole(self, first: int) -> Any:
        """Afterwards ``times`` are those of the measured steps."""
        steps = [step - first for step in self._measured]
        self.times = torch.cat([self.times[steps], self.times[-1:]])
        if self.calibration is not None and not same_times(self.times, self.calibration.times):
            raise ValueError(
                "this call has another schedule than those before it (another resolution or number of steps); "
                "calibrate each on its own"
            )
        return {}


@dataclass
class _StreamOfCall:
    """The chosen tokens of one stream during one call, from measured step ``first`` on, and the output head at each.

    ``moved`` is the summed mean squared change from step to step: of all tokens, and of the chosen ones.
    """

    first: int
    shape: torch.Size
    chosen: list[Tensor] = field(default_factory=list)
    heads: list[LinearHead | None] = field(default_factory=list)
    moved: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    _previous: Tensor | None = None

    def add(self, call: Call, feature: Tensor, chosen: Tensor) -> None:
        if not bool(chosen.isfinite().all()):
            raise ValueError(f"the feature of step {call.step} holds NaN or infinity; the call is not counted")
        if self._previous is not None:
            pairs = (feature, self._previous), (chosen, self.chosen[-1])
            self.moved += torch.stack([(a - b).square().mean(dtype=torch.float64) for a, b in pairs]).cpu()
        self._previous = feature.clone()
        self.chosen.append(chosen.clone())
        self.heads.append(None if call.head is None or feature.ndim < 3 else call.head())

    @property
    def token_error(self) -> float:
        """How far the change of the chosen tokens is from that of all of them, relative."""
        whole, chosen = self.moved.tolist()
        return abs(chosen / whole - 1) if whole else 0.0

    def measured(self) -> Measured:
        """The statistics."""
        gram, heads = GramMatrix(len(self.chosen)), [head for head in self.heads if head is not None]
        for step, feature in enumerate(self.chosen):
            gram.update(step, feature)
        if len(heads) < len(self.chosen):
            return Measured(gram, None, self.first)
        tokens = [feature.flatten(1, -2) for feature in self.chosen]
        return Measured(gram, measure_output_errors(tokens, heads), self.first)


def _spread(first: int, steps: int) -> list[int]:
    """At most ``MEASURED`` steps from ``first`` to the last, evenly spread."""
    count = min(steps - first, MEASURED)
    return [first + round(i * (steps - 1 - first) / max(1, count - 1)) for i in range(count)]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold: numbers and strings, such as steps and guidance."""
    return {name: value for name, value in options.items() if isinstance(value, int | float | str | bool)}
