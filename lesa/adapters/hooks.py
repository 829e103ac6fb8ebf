"""What is put on the modules of a transformer, by one recipe for all models.

While the control says skip, each block hands its inputs through, and the head, the final norm, gets the driver's
prediction in place of what came through. On a full step the head's input is the feature that is kept.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

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
        self.dtype: torch.dtype | None = None  # that the transformer is called with
        self._signatures: dict[Hashable, int] = {}

    def begin(self, call: Call, dtype: torch.dtype | None) -> None:
        """Ask the driver what becomes of a call."""
        self.dtype = dtype
        self.shapes = self._signatures.setdefault(call.signature, len(self._signatures))
        self.skip = self.driver.begin(call)

    def end(self, *, failed: bool) -> None:
        """The call is over; ``failed``: by an exception."""
        self.inside = self.skip = False
        self.driver.end(failed=failed)


class Block:
    """Answers the calls of a block: hands its inputs through while the control says skip.

    For each output of the first full call with inputs of certain shapes it notes which input has the same shape. The
    values do not matter, since the head's input is replaced. A block that changes shapes keeps running.
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
            self._sources[control.shapes] = Sources.of(outputs, args, kwargs)
        return outputs


class Sources:
    """Which input of a block stands in for each of its outputs.

    Args:
        inputs: the position or name of an argument, or None where the output is None.
        kind: tuple or list, or None if the block returns one tensor.
    """

    def __init__(self, inputs: list[int | str | None], kind: type | None) -> None:
        self._inputs = inputs
        self._kind = kind

    @classmethod
    def of(cls, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Sources | None":
        """For each output an input of its shape, each input once if possible; None if some output has no match."""
        kind = type(outputs) if isinstance(outputs, tuple | list) else None
        natural = {"hidden_states": 0, "encoder_hidden_states": 1}  # so that equal lengths do not swap image and text
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = sorted(given, key=lambda item: natural.get(str(item[0]), 2))
        sources: list[int | str | None] = []
        for output in outputs if kind else (outputs,):
            if output is None:
                sources.append(None)
                continue
            fitting = [k for k, v in given if isinstance(v, Tensor) and v.shape == getattr(output, "shape", None)]
            fresh = [key for key in fitting if key not in sources]
            if not fitting:
                return None
            sources.append((fresh or fitting)[0])
        return cls(sources, kind)

    def pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would have returned, as far as shapes go."""
        picked = [None if k is None else args[k] if isinstance(k, int) else kwargs[k] for k in self._inputs]
        return picked[0] if self._kind is None else self._kind(picked)


class Head:
    """Native hook before the final norm: keeps the feature of a full step, puts in that of a predicted one."""

    def __init__(self, control: Control, name: str) -> None:
        self._control = control
        self._name = name

    @torch.compiler.disable(recursive=False)
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        control = self._control
        if not control.inside:
            return None
        key = None if args else next(iter(kwargs))
        feature = args[0] if key is None else kwargs[key]
        if not control.skip:
            # Wan's family widens the feature to float32 for its norm: what is kept need not be
            control.driver.keep(self._name, feature if control.dtype is None else feature.to(control.dtype))
            return None
        prediction = control.driver.predict(self._name).to(feature.dtype)
        return ((prediction, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: prediction})


def hook_blocks(control: Control, blocks: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Let blocks hand their inputs through on predicted steps; returns what undoes it."""
    return [intercept(block, Block(control)) for block in dict.fromkeys(blocks)]


def hook_heads(control: Control, heads: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Keep or replace what enters each head; returns what undoes it."""
    hooks = (module.register_forward_pre_hook(Head(control, name), with_kwargs=True) for name, module in heads.items())
    return [handle.remove for handle in hooks]
