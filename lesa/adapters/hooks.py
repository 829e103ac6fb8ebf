"""The hooks on the modules of a transformer, the same for all models.

On predicted steps every block returns its inputs, and the head (the final norm) gets the driver's prediction as its
input. On full steps the input of the head is the feature that is kept.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.runtime.driver import Call, Driver

Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]  # (forward, args, kwargs) -> output


class SkipState:
    """What the hooks of one transformer share. Plain values, since compiled code is guarded on them."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.inside = False  # a call that the driver knows is inside the forward
        self.skip = False
        self.shapes = 0  # the index of this call's signature among those seen so far
        self.split = False  # context parallelism: blocks may return fewer tokens than they are given
        self.heads: list[HeadHook] = []
        self._dtype: torch.dtype | None = None  # of the transformer's input
        self._branch = ""
        self._signature: Hashable = None
        self._signatures: dict[Hashable, int] = {}

    def begin(self, call: Call, dtype: torch.dtype | None) -> None:
        """Ask the driver what this call does."""
        self._dtype, self._branch = dtype, call.branch
        if call.signature is not self._signature:
            self._signature = call.signature
            self.shapes = self._signatures.setdefault(call.signature, len(self._signatures))
        self.skip = self.driver.begin(call)

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, mean: bool = True
    ) -> Any:
        """Run the forward, and give the driver the features of a full step.

        The driver is called before and after the forward, not inside, so that a compiled forward is one graph.
        ``mean``: where a full step is divided into substeps, the head is given the mean feature over it.
        """
        for head in self.heads:
            predicted = self.skip and self._branch in head.reached_by
            head.prediction = self.driver.predict(head.name) if predicted else None
            head.mean = None if self.skip or not mean else self.driver.mean(head.name)
        self.inside = True
        output = forward(*args, **kwargs)
        for head in self.heads:
            feature, head.feature, head.prediction, head.mean = head.feature, None, None, None
            if not self.skip:
                (head.reached_by.discard if feature is None else head.reached_by.add)(self._branch)
            if feature is not None:
                # Wan widens the feature to float32 for its norm; it is kept in the dtype of the input
                self.driver.keep(head.name, feature if self._dtype is None else feature.to(self._dtype))
        return output

    def end(self, *, failed: bool) -> None:
        """The call is over; ``failed``: it raised an exception."""
        self.inside = self.skip = False
        if failed:
            for head in self.heads:
                head.feature = head.prediction = head.mean = None
        self.driver.end(failed=failed)


class BlockHook:
    """On predicted steps a block returns its inputs.

    At the first full call with inputs of certain shapes it notes, for each output, an input of the same shape. The
    values do not matter, since the input of the head is replaced. A block that changes shapes keeps running, except
    where context parallelism has split its tokens: then it returns as many of its input's tokens as it would have.
    """

    def __init__(self, state: SkipState) -> None:
        self._state = state
        self._pass_through: dict[int, PassThrough | None] = {}  # by the signature of the transformer's inputs

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        if not state.inside:
            return forward(*args, **kwargs)
        pass_through = self._pass_through.get(state.shapes)
        if state.skip and pass_through is not None:
            return pass_through.outputs(args, kwargs)
        outputs = forward(*args, **kwargs)
        if state.shapes not in self._pass_through:
            self._pass_through[state.shapes] = PassThrough.of(outputs, args, kwargs, split=state.split)
        return outputs


class BlockInput(NamedTuple):
    """The input of a block that is returned in place of one of its outputs."""

    key: int | str  # its position or name
    tokens: int | None = None  # how many of its tokens; None: all

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        value: Tensor = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        return value if self.tokens is None else value[:, : self.tokens]


class PassThrough:
    """Which input of a block is returned in place of each output.

    Args:
        inputs: one for each output, or None where the output is None.
        kind: tuple or list, or None if the block returns one tensor.
    """

    def __init__(self, inputs: list[BlockInput | None], kind: type | None) -> None:
        self._inputs = inputs
        self._kind = kind

    @classmethod
    def of(
        cls, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, split: bool = False
    ) -> "PassThrough | None":
        """For each output an input of its shape, each input once if possible; None if an output has no match.

        ``split``: where there is none, an input with more tokens is used.
        """
        kind = type(outputs) if isinstance(outputs, tuple | list) else None
        natural = {"hidden_states": 0, "encoder_hidden_states": 1}  # so that equal lengths do not swap image and text
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = sorted(given, key=lambda item: natural.get(str(item[0]), 2))
        tensors = {key: value for key, value in given if isinstance(value, Tensor)}
        inputs: list[BlockInput | None] = []
        for output in outputs if kind else (outputs,):
            if output is None:
                inputs.append(None)
                continue
            shape, tokens = getattr(output, "shape", None), None
            fitting = [key for key, value in tensors.items() if value.shape == shape]
            if split and not fitting and isinstance(output, Tensor):
                fitting, tokens = [key for key, value in tensors.items() if _is_part(output, value)], output.shape[1]
            if not fitting:
                return None
            taken = [used.key for used in inputs if used is not None]
            fresh = [key for key in fitting if key not in taken]
            inputs.append(BlockInput((fresh or fitting)[0], tokens))
        return cls(inputs, kind)

    def outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inputs in the shapes of the outputs."""
        picked = [None if source is None else source.take(args, kwargs) for source in self._inputs]
        return picked[0] if self._kind is None else self._kind(picked)


def _is_part(some: Tensor, whole: Tensor) -> bool:
    """Whether [B, fewer tokens, ...] can be some tokens of [B, tokens, ...]."""
    a, b = some.shape, whole.shape
    return len(a) == len(b) > 2 and a[1] < b[1] and (a[0], *a[2:]) == (b[0], *b[2:])


class HeadHook:
    """A forward pre-hook on the final norm: takes the feature of a full step, puts in the prediction of another.

    Attributes:
        name: of the head.
        prediction: what to put in.
        feature: what was taken in this call.
        mean: what to put in at a full step in place of the feature: ``part + share * feature``; a part of None is zero.
        reached_by: branches whose latest full step ran this head; a model with several heads may not use all.
    """

    def __init__(self, state: SkipState, name: str) -> None:
        self.name = name
        self.prediction: Tensor | None = None
        self.feature: Tensor | None = None
        self.mean: tuple[Tensor | None, float] | None = None
        self.reached_by: set[str] = set()
        self._state = state

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._state.inside:
            return None
        key = None if args else next(iter(kwargs))
        feature = args[0] if key is None else kwargs[key]
        if self._state.skip:
            assert self.prediction is not None, "no step is predicted before a feature was taken here"
            given = self.prediction
        else:
            self.feature = feature
            if self.mean is None or self.mean == (None, 1.0):
                return None
            part, share = self.mean
            given = share * feature if part is None else torch.add(part.to(feature.dtype), feature, alpha=share)
        given = given.to(feature.dtype)
        return ((given, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: given})


def hook_blocks(state: SkipState, blocks: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Let blocks return their inputs on predicted steps; returns the functions that undo it."""
    return [intercept(block, BlockHook(state)) for block in dict.fromkeys(blocks)]


def hook_heads(state: SkipState, heads: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Keep or replace the input of each head; returns the functions that undo it."""
    state.heads = [HeadHook(state, name) for name in heads]
    hooks = zip(state.heads, heads.values(), strict=True)
    return [module.register_forward_pre_hook(head, with_kwargs=True).remove for head, module in hooks]


def needs_gradients(module: nn.Module, inputs: Iterable[Tensor]) -> bool:
    """Whether gradients may be needed through a call; then it runs unchanged."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in inputs) or any(p.requires_grad for p in module.parameters())


def intercept(module: nn.Module, answer: Answer) -> Callable[[], None]:
    """Let ``answer(forward, args, kwargs)`` handle every call of one module instance; returns what undoes it.

    The class of the instance becomes a subclass of itself. A replaced ``forward`` would be lost when accelerate puts an
    older one back, a forward hook cannot keep the forward from running, and a compiled module stays compiled.

    Others do the same on top of it (FSDP2, parametrisation). After the undo their class still has ours among its bases;
    it finds no answer on the instance, and a call is what it was before.
    """
    original: Any = type(module)
    module.__dict__["_lesa_answer"] = answer
    taken = _answering(original)
    module.__class__ = taken

    def restore() -> None:
        if module.__dict__.get("_lesa_answer") is not answer:
            return
        del module.__dict__["_lesa_answer"]
        if type(module) is taken:
            module.__class__ = original

    return restore


@functools.cache
def _answering(original: Any) -> Any:
    """The subclass: one for all instances, since torch.compile compiles for each class again."""

    forward = original.__call__  # looked up here, since torch.compile cannot do it
    reduce = original.__reduce_ex__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_lesa_answer" not in self.__dict__:
            return forward(self, *args, **kwargs)
        return self._lesa_answer(functools.partial(forward, self), args, kwargs)

    def refuse(self: Any, protocol: Any) -> Any:
        if "_lesa_answer" not in self.__dict__:
            return reduce(self, protocol)
        raise TypeError(f"this {original.__name__} cannot be copied or pickled while lesa is enabled; disable it first")

    names = {"__call__": call, "__reduce_ex__": refuse, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (original,), names)
