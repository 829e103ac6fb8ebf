"""Hooks that put a driver inside a transformer, by one recipe for all models:

the root asks the driver at every call whether its blocks are skipped. If so, and the end of the model is known, the
output is made from the driver's prediction at once; else the forward runs, in which each block hands its inputs through
and the head, the final norm, gets the prediction in place of what came through.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lesa.adapters.diffusers.clock import Clock
from lesa.adapters.diffusers.compat import (
    HookRegistry,
    ModelHook,
    StateManager,
    active_cache,
    context_name,
    refresh_hooks,
    unwrap_module,
)
from lesa.adapters.diffusers.discovery import find_blocks, find_heads
from lesa.adapters.diffusers.finish import find_finish
from lesa.runtime.driver import Call, Driver

RECEIVER, BLOCK = "lesa_receiver", "lesa_block"


class Control:
    """What the hooks of one transformer share. ``skip`` is a plain bool, which compiled blocks are guarded on."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.inside = False  # between the root's hooks, under a driver that has been asked
        self.skip = False


class Receiver(ModelHook):
    """Changes nothing; diffusers tells it the current cache context and the end of each pipeline call."""

    _is_stateful = True

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver
        self.manager = StateManager(object)  # found by cache_context() among the attributes of stateful hooks

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.driver.reset()
        return module


class Root:
    """Takes every call of the transformer, before any forward or hook of it."""

    def __init__(
        self, control: Control, transformer: nn.Module, component: str, clock: Clock, receiver: Receiver
    ) -> None:
        self.control = control
        self.component = component
        self.clock = clock
        self.receiver = receiver
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.finish = find_finish(transformer)
        self.transformer = transformer
        self._place: tuple[object, int] | None = None
        self._calls_here = 0

    @torch.compiler.disable(recursive=False)
    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if _needs_gradients(self.transformer, arguments):
            return forward(*args, **kwargs)
        control, failed = self.control, True
        control.skip = control.driver.begin(self._identify(arguments))
        try:
            output = self._finish(arguments) if control.skip else None
            if output is None:
                control.inside = True
                output = forward(*args, **kwargs)
            failed = False
            return output
        finally:
            control.inside = control.skip = False
            control.driver.end(failed=failed)

    def _identify(self, arguments: dict[str, Any]) -> Call:
        moment = self.clock.read(arguments)
        return Call(
            component=self.component,
            branch=self._branch(moment.generation, moment.step),
            step=moment.step,
            times=moment.times,
            generation=moment.generation,
            signature=tuple((k, tuple(t.shape), t.dtype) for k, t in arguments.items() if isinstance(t, Tensor)),
        )

    def _finish(self, arguments: dict[str, Any]) -> Any:
        """The output straight from the prediction, where the end of the model is known."""
        if self.finish is None:
            return None
        sample = self.finish(self.transformer, arguments, self.control.driver)
        if sample is None:
            return None
        return Transformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)

    def _branch(self, generation: object, step: int) -> str:
        """The name the pipeline gives, else ``call0``, ``call1``, ... in the order of calls within a step."""
        name = context_name(self.receiver.manager)
        if name is not None:
            return name
        same_place = self._place is not None and self._place[0] is generation and self._place[1] == step
        self._calls_here = self._calls_here + 1 if same_place else 0
        self._place = (generation, step)
        return f"call{self._calls_here}"


def intercept(module: nn.Module, call: Callable[..., Any]) -> Callable[[], None]:
    """Let ``call(forward, args, kwargs)`` answer every call of one module; returns what undoes it.

    The instance's class becomes a subclass of itself. A replaced ``forward`` would be lost when accelerate puts an
    older one back, and a forward hook cannot keep the forward from running.
    """
    original = type(module)

    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(functools.partial(original.__call__, self), args, kwargs)

    def refuse(self: nn.Module, protocol: Any) -> Any:
        raise TypeError(f"this {original.__name__} cannot be copied or pickled while lesa is enabled; disable it first")

    names = {
        "__call__": answer,
        "__reduce_ex__": refuse,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    taken = type(original.__name__, (original,), names)
    module.__class__ = taken

    def restore() -> None:
        if type(module) is taken:
            module.__class__ = original

    return restore


class Block(ModelHook):
    """Hands its inputs through while the control says skip.

    For each output of the first full call it notes which input has the same shape. The values do not matter, since
    the head's input is replaced. A block that changes shapes keeps running.
    """

    def __init__(self, control: Control) -> None:
        super().__init__()
        self.control = control
        self._sources: list[int | str | None] | None = None  # for each output, the input with its shape
        self._returns_tuple = False

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.control.skip and self._sources is not None:
            inputs: dict[int | str | None, Any] = dict(enumerate(args)) | kwargs | {None: None}
            outputs = tuple(inputs[source] for source in self._sources)
            return outputs if self._returns_tuple else outputs[0]
        outputs = self.fn_ref.original_forward(*args, **kwargs)
        if self._sources is None:
            self._returns_tuple = isinstance(outputs, tuple)
            self._sources = _match(outputs if self._returns_tuple else (outputs,), args, kwargs)
        return outputs


def _match(outputs: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | str | None] | None:
    """For each output an input of its shape, each input once if possible; None if some output has no match."""
    natural = {"hidden_states": 0, "encoder_hidden_states": 1}  # so that equal lengths do not swap image and text
    inputs: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    inputs = sorted(inputs, key=lambda item: natural.get(str(item[0]), 2))
    sources: list[int | str | None] = []
    for output in outputs:
        if output is None:
            sources.append(None)
            continue
        fitting = [k for k, v in inputs if isinstance(v, Tensor) and v.shape == getattr(output, "shape", None)]
        fresh = [key for key in fitting if key not in sources]
        if not fitting:
            return None
        sources.append((fresh or fitting)[0])
    return sources


class Head:
    """Native hook before the final norm: keeps the feature of a full step, puts in that of a predicted one."""

    def __init__(self, control: Control, name: str) -> None:
        self.control = control
        self.name = name

    @torch.compiler.disable(recursive=False)
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        control = self.control
        if not control.inside:
            return None
        key = None if args else next(iter(kwargs))
        feature = args[0] if key is None else kwargs[key]
        if not control.skip:
            control.driver.keep(self.name, feature)
            return None
        prediction = control.driver.predict(self.name).to(feature.dtype)
        return ((prediction, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: prediction})


def _needs_gradients(transformer: nn.Module, arguments: dict[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    inputs = (value for value in arguments.values() if isinstance(value, Tensor))
    return any(t.requires_grad for t in inputs) or any(p.requires_grad for p in transformer.parameters())


class Attachment:
    """A driver's hooks on one transformer; :meth:`remove` takes all of them off again.

    Raises:
        ValueError: if the transformer has another cache enabled, or no blocks or head can be found; nothing is
            changed then.
    """

    def __init__(self, transformer: nn.Module, component: str, clock: Clock, driver: Driver) -> None:
        inner = unwrap_module(transformer)
        cache = active_cache(inner)
        if cache is not None:
            raise ValueError(
                f"a cache of diffusers is enabled on this transformer ({type(cache).__name__}); two caches would undo "
                "each other: call transformer.disable_cache() first"
            )
        heads, self._blocks = find_heads(inner), find_blocks(inner)
        self._transformer = inner
        control, receiver = Control(driver), Receiver(driver)
        root = Root(control, inner, component, clock, receiver)
        HookRegistry.check_if_exists_or_initialize(inner).register_hook(receiver, RECEIVER)
        for block in self._blocks:
            HookRegistry.check_if_exists_or_initialize(block).register_hook(Block(control), BLOCK)
        refresh_hooks(inner)
        self._restore = intercept(transformer, root)
        self._handles = [
            module.register_forward_pre_hook(Head(control, name), with_kwargs=True) for name, module in heads.items()
        ]
        # Pipelines call this at their end if it exists; models with a cache of their own have it already.
        self._adds_reset = not hasattr(inner, "_reset_stateful_cache")
        if self._adds_reset:
            inner._reset_stateful_cache = driver.reset

    def remove(self) -> None:
        """Restore the transformer exactly."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            HookRegistry.check_if_exists_or_initialize(block).remove_hook(BLOCK, recurse=False)
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(RECEIVER, recurse=False)
        refresh_hooks(self._transformer)
        if self._adds_reset:
            del self._transformer._reset_stateful_cache
