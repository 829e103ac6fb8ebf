"""What is put on the modules of a transformer, by one recipe for all models.

While the control says skip, each block hands its inputs through, and the head, the final norm, gets the driver's
prediction in place of what came through. On a full step the head's input is the feature that is kept.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.adapters.interception import intercept
from lesa.runtime.driver import Call, Driver


class Control:
    """What the hooks of one transformer share. Plain values, which compiled code is guarded on."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.inside = False  # a call is going through the forward, under a driver that has been asked
        self.skip = False
        self.shapes = 0  # which of the signatures seen so far this call has
        self.split = False  # blocks may return fewer tokens than they are given: the others are another process's
        self.heads: list[Head] = []
        self._dtype: torch.dtype | None = None  # that the transformer is called with
        self._branch = ""
        self._signature: Hashable = None
        self._signatures: dict[Hashable, int] = {}

    def begin(self, call: Call, dtype: torch.dtype | None) -> None:
        """Ask the driver what becomes of a call."""
        self._dtype, self._branch = dtype, call.branch
        if call.signature is not self._signature:
            self._signature = call.signature
            self.shapes = self._signatures.setdefault(call.signature, len(self._signatures))
        self.skip = self.driver.begin(call)

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Go through the forward, and give the driver the features of a full step.

        It is asked before and told after, so that a compiled forward is one graph.
        """
        for head in self.heads:
            predicted = self.skip and self._branch in head.reached_by
            head.prediction = self.driver.predict(head.name) if predicted else None
        self.inside = True
        output = forward(*args, **kwargs)
        for head in self.heads:
            feature, head.feature, head.prediction = head.feature, None, None
            if not self.skip:
                (head.reached_by.discard if feature is None else head.reached_by.add)(self._branch)
            if feature is not None:
                # Wan's family widens the feature to float32 for its norm: what is kept need not be
                self.driver.keep(head.name, feature if self._dtype is None else feature.to(self._dtype))
        return output

    def end(self, *, failed: bool) -> None:
        """The call is over; ``failed``: by an exception."""
        self.inside = self.skip = False
        if failed:
            for head in self.heads:
                head.feature = head.prediction = None
        self.driver.end(failed=failed)


class Block:
    """Answers the calls of a block: hands its inputs through while the control says skip.

    For each output of the first full call with inputs of certain shapes it notes which input has the same shape. The
    values do not matter, since the head's input is replaced. A block that changes shapes keeps running, but for one
    that context parallelism has split the tokens of: of these it hands through as many as it would have returned.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._sources: dict[int, Sources | None] = {}  # by the shapes of the transformer's inputs

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        control = self._control
        if not control.inside:
            return forward(*args, **kwargs)
        sources = self._sources.get(control.shapes)
        if control.skip and sources is not None:
            return sources.pick(args, kwargs)
        outputs = forward(*args, **kwargs)
        if control.shapes not in self._sources:
            self._sources[control.shapes] = Sources.of(outputs, args, kwargs, split=control.split)
        return outputs


class Source(NamedTuple):
    """The input of a block that stands in for one of its outputs."""

    key: int | str  # its position or name
    tokens: int | None = None  # how many of them; None: all

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        value: Tensor = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        return value if self.tokens is None else value[:, : self.tokens]


class Sources:
    """Which input of a block stands in for each of its outputs.

    Args:
        sources: one for each output, or None where the output is None.
        kind: tuple or list, or None if the block returns one tensor.
    """

    def __init__(self, sources: list[Source | None], kind: type | None) -> None:
        self._sources = sources
        self._kind = kind

    @classmethod
    def of(
        cls, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, split: bool = False
    ) -> "Sources | None":
        """For each output an input of its shape, each input once if possible; None if some output has no match.

        ``split``: where there is none, an input with more tokens will do.
        """
        kind = type(outputs) if isinstance(outputs, tuple | list) else None
        natural = {"hidden_states": 0, "encoder_hidden_states": 1}  # so that equal lengths do not swap image and text
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = sorted(given, key=lambda item: natural.get(str(item[0]), 2))
        tensors = {key: value for key, value in given if isinstance(value, Tensor)}
        sources: list[Source | None] = []
        for output in outputs if kind else (outputs,):
            if output is None:
                sources.append(None)
                continue
            shape, tokens = getattr(output, "shape", None), None
            fitting = [key for key, value in tensors.items() if value.shape == shape]
            if split and not fitting and isinstance(output, Tensor):
                fitting, tokens = [key for key, value in tensors.items() if _is_part(output, value)], output.shape[1]
            if not fitting:
                return None
            taken = [source.key for source in sources if source is not None]
            fresh = [key for key in fitting if key not in taken]
            sources.append(Source((fresh or fitting)[0], tokens))
        return cls(sources, kind)

    def pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would have returned, as far as shapes go."""
        picked = [None if source is None else source.take(args, kwargs) for source in self._sources]
        return picked[0] if self._kind is None else self._kind(picked)


def _is_part(some: Tensor, whole: Tensor) -> bool:
    """Whether [B, fewer tokens, ...] can be some of [B, tokens, ...]."""
    a, b = some.shape, whole.shape
    return len(a) == len(b) > 2 and a[1] < b[1] and (a[0], *a[2:]) == (b[0], *b[2:])


class Head:
    """Native hook before the final norm: takes the feature of a full step, puts in the prediction of another.

    Attributes:
        name: of the head.
        prediction: what to put in.
        feature: what was taken in this call.
        reached_by: branches whose latest full step came by; of several heads some may not be used.
    """

    def __init__(self, control: Control, name: str) -> None:
        self.name = name
        self.prediction: Tensor | None = None
        self.feature: Tensor | None = None
        self.reached_by: set[str] = set()
        self._control = control

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._control.inside:
            return None
        key = None if args else next(iter(kwargs))
        feature = args[0] if key is None else kwargs[key]
        if not self._control.skip:
            self.feature = feature
            return None
        assert self.prediction is not None, "no step is predicted before a feature was taken here"
        prediction = self.prediction.to(feature.dtype)
        return ((prediction, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: prediction})


def hook_blocks(control: Control, blocks: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Let blocks hand their inputs through on predicted steps; returns what undoes it."""
    return [intercept(block, Block(control)) for block in dict.fromkeys(blocks)]


def hook_heads(control: Control, heads: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Keep or replace what enters each head; returns what undoes it."""
    control.heads = [Head(control, name) for name in heads]
    hooks = zip(control.heads, heads.values(), strict=True)
    return [module.register_forward_pre_hook(head, with_kwargs=True).remove for head, module in hooks]


def needs_gradients(module: nn.Module, inputs: Iterable[Tensor]) -> bool:
    """Whether somebody may differentiate through a call: then it runs as it is."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in inputs) or any(p.requires_grad for p in module.parameters())
