"""Runs the calls of a pipeline one by one, in full, and returns the features of all steps."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.adapters.diffusers.attachment import Attachment
from lesa.adapters.diffusers.pipeline import describe_model, weights_digest
from lesa.arguments import whole
from lesa.runtime.driver import Call, Driver
from lesa.runtime.transfer import to_device
from lesa.tables.forecaster import Stream

Prompt = str | list[str] | dict[str, Any]
Features = Mapping[Stream, Tensor]  # [samples, steps, *feature] of each stream of one call


class Observer(Driver):
    """Runs every step in full and calls ``on_feature(call, feature)`` with the input of the head."""

    def __init__(self, on_feature: Callable[[Call, Tensor], None]) -> None:
        self._on_feature = on_feature
        self._call: Call | None = None

    def begin(self, call: Call) -> bool:
        self._call = call
        return False

    def keep(self, head: str, feature: Tensor) -> None:
        if self._call is not None:
            self._on_feature(self._call, feature.detach())

    def end(self, *, failed: bool) -> None:
        self._call = None


class Recorder:
    """The features of pipeline calls. The arguments are those of :func:`lesa.collect`.

    Attributes:
        times: noise levels [steps + 1] of the latest call.
        firsts: the first step of each stream in it; a stream may take part in some steps only.
        on_start: called once, with the bytes of a call and a description of them, when they are known.

    Raises:
        ValueError: if there are no prompts, or a number of tokens below one.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Prompt],
        seed: int,
        tokens: int | None,
        dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> None:
        prompts = prompt_list(prompts)
        whole("seed", seed)
        if tokens is not None:
            whole("tokens", tokens, least=1)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be one of floating-point numbers, such as torch.bfloat16, not {dtype!r:.80}")
        self.times = torch.empty(0)
        self.firsts: dict[Stream, int] = {}
        self.on_start: Callable[[int, str], None] | None = None
        self._pipeline = pipeline
        self._prompts = prompts
        self._seed = seed
        self._tokens = tokens
        self._dtype = dtype
        self._options = options
        self._features: dict[Stream, Tensor] = {}
        self._ran: dict[Stream, tuple[int, int]] = {}  # the first and the latest step of each
        self._subsets: dict[int, Tensor] = {}

    def request(self, index: int) -> dict[str, Any]:
        """What the features of call ``index`` depend on: model, weights, arguments, seed, tokens and dtype."""
        return {
            "models": describe_model(self._pipeline),
            "weights": weights_digest(self._pipeline),
            "prompts, seeds or options": _fingerprint(self._arguments(index)),
            "tokens": self._tokens,
            "dtypes": str(self._dtype),
        }

    def name(self, index: int) -> str:
        """A name of call ``index``: a hash of its arguments, seed and tokens."""
        return _fingerprint([self._arguments(index), self._tokens, str(self._dtype)])

    def record(self, index: int) -> Features:
        """The features [samples, steps, ...] of call ``index``, by stream.

        Raises:
            ValueError: if it ended before its last step.
        """
        self._features, self._ran, self._subsets = {}, {}, {}
        self._generator = torch.Generator().manual_seed(self._seed + index)
        with Attachment(self._pipeline, Observer(self._add)):
            self._pipeline(**self._arguments(index))
        steps = len(self.times) - 1
        if not self._features or all(last != steps - 1 for _, last in self._ran.values()):
            ran = {".".join(stream): f"{first} to {last}" for stream, (first, last) in self._ran.items()}
            raise ValueError(f"only steps {ran} of {steps} steps ran; features are collected on whole generations")
        first = min(first for first, _ in self._ran.values())
        self.times = self.times[first:]  # a generation that starts part-way has the rest of its schedule
        self.firsts = {stream: begun - first for stream, (begun, _) in self._ran.items()}
        return self._whole(first)

    def _whole(self, first: int) -> Features:
        """The features of each stream on the steps that it took part in, in a call that began with step ``first``."""
        self._start()
        return {s: features[:, self._ran[s][0] : self._ran[s][1] + 1] for s, features in self._features.items()}

    def _note(self, stream: Stream, step: int) -> None:
        """A stream runs this step.

        Raises:
            ValueError: if a step before it was left out.
        """
        first, last = self._ran.get(stream, (step, step - 1))
        if step != last + 1:
            raise ValueError(
                f"{'.'.join(stream)} runs step {step} after step {last}; its steps have to follow each other"
            )
        self._ran[stream] = first, step

    def _arguments(self, index: int) -> dict[str, Any]:
        return call_arguments(self._prompts[index], self._seed + index, self._options)

    def _add(self, call: Call, feature: Tensor) -> None:
        assert call.times is not None, "a pipeline knows its times"
        self.times, feature = call.times, self._subset(feature)
        stream, steps = (call.component, call.branch), len(call.times) - 1
        if call.step > 0:  # every stream is known now
            self._start()
        if stream not in self._features:
            # [samples, steps, ...], so that a sample is one piece of memory
            shape = len(feature), steps, *feature.shape[1:]
            self._features[stream] = feature.new_empty(shape, device="cpu", dtype=self._dtype or feature.dtype)
        self._note(stream, call.step)
        self._features[stream][:, call.step] = feature

    def _subset(self, feature: Tensor) -> Tensor:
        """The chosen tokens of a feature [samples, ..., channels], on its device."""
        if self._tokens is None or feature.ndim < 3:
            return feature
        flat = feature.flatten(1, -2)
        count = flat.shape[1]
        if count <= self._tokens:
            return flat
        if count not in self._subsets:
            chosen = torch.randperm(count, generator=self._generator)[: self._tokens].sort().values
            self._subsets[count] = to_device(chosen, feature.device)
        return flat[:, self._subsets[count]]

    def _start(self) -> None:
        if self.on_start is not None:
            announce, self.on_start = self.on_start, None
            streams = self._features.values()
            shapes = " and ".join(f"{list(f.shape)} {str(f.dtype).removeprefix('torch.')}" for f in streams)
            announce(sum(f.nbytes for f in streams), shapes)


def prompt_list(prompts: Sequence[Prompt] | Prompt) -> list[Prompt]:
    """One call each; a single prompt is one call, not one for each of its letters.

    Raises:
        ValueError: if there are none, or something that is no prompt is among them.
    """
    if isinstance(prompts, str | dict):
        return [prompts]
    made = list(prompts) if isinstance(prompts, Iterable) else []
    if not made:
        raise ValueError("no prompts: give a list of at least one prompt, or of keyword arguments of a call")
    for prompt in made:
        if not isinstance(prompt, str | list | dict):
            raise ValueError(f"prompts are strings, lists of strings or keyword arguments, not {type(prompt).__name__}")
    return made


def call_arguments(prompt: Prompt, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a pipeline call, from a generator with this seed unless the prompt brings one."""
    call = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    call = {"generator": torch.Generator().manual_seed(seed), **options, **call}
    return call | {"generator": _copies(call["generator"])}  # so that a repeated call is the same


def _copies(generator: Any) -> Any:
    if isinstance(generator, list | tuple):
        return [_copies(g) for g in generator]
    return generator if generator is None else torch.Generator(generator.device).set_state(generator.get_state())


def _fingerprint(value: Any) -> str:
    """A hash of nested arguments by value, not by identity."""
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
