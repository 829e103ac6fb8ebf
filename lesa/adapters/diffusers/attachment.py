"""A driver's hooks on one transformer, and on all transformers of a pipeline."""

from collections.abc import Callable
from threading import RLock
from types import TracebackType
from typing import Any, Self

from torch import nn

from lesa.adapters.diffusers.compat import (
    CacheContextHook,
    CacheContexts,
    HookRegistry,
    is_split,
    refresh_hooks,
    refuse_caches,
    unwrap_module,
)
from lesa.adapters.diffusers.pipeline import find_transformers
from lesa.adapters.diffusers.step_clock import StepClock, make_clock
from lesa.adapters.diffusers.structure import Structure
from lesa.adapters.diffusers.transformer_hook import TransformerHook
from lesa.adapters.hooks import SkipState, hook_blocks, hook_heads, intercept
from lesa.runtime.driver import Driver

HOOK = "lesa_cache_context"  # the name of our hook in the registry of diffusers
# The attribute of a transformer, and of its pipeline, that holds the attachment. There is no other reference to it, so
# it is freed with the pipeline.
ATTRIBUTE = "_lesa_attachment"


class Attachment:
    """Attaches a driver to every transformer of a pipeline. A context manager that detaches it at its end.

    Args:
        target: a pipeline, or a bare transformer.
        driver: decides what each call does.
        clock: tells the step of a call; None: by the pipeline's scheduler, or the calls of a bare transformer.

    Raises:
        ValueError: if a driver cannot be attached to one of the transformers, or one is attached already; nothing is
            changed then.
    """

    def __init__(self, target: Any, driver: Driver, clock: StepClock | None = None) -> None:
        transformers = find_transformers(target)
        self._driver = driver
        self._clock = clock or make_clock(target)
        self._lock = RLock()
        self._hooked: list[HookedTransformer] = []
        self._marked: list[Any] = []
        modules = [unwrap_module(transformer) for transformer in transformers.values()]
        taken = [name for name, module in zip(transformers, modules, strict=True) if ATTRIBUTE in vars(module)]
        if taken:
            raise ValueError(f"lesa is already enabled on {', '.join(taken)}; call lesa.disable(...) first")
        try:
            for component, transformer in transformers.items():
                self._hooked.append(HookedTransformer(transformer, component, self._clock, driver, self._lock))
        except BaseException:
            self.disable()
            raise
        self._marked = [*modules, target]
        for marked in self._marked:
            vars(marked)[ATTRIBUTE] = self

    @property
    def enabled(self) -> bool:
        """Whether the hooks are on the transformers."""
        return bool(self._hooked)

    def disable(self) -> None:
        """Restore the transformers exactly; a second call does nothing."""
        with self._lock:
            while self._hooked:
                self._hooked.pop().remove()
            self._clock.close()
            while self._marked:
                marked = vars(self._marked.pop())
                if marked.get(ATTRIBUTE) is self:
                    del marked[ATTRIBUTE]
            self._driver.reset()

    def reset(self) -> None:
        """Drop all kept features, as at the end of a generation."""
        with self._lock:
            self._driver.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._driver.end(failed=True)  # no warning about a generation that an exception cut short
        self.disable()


def detach(target: Any) -> None:
    """Detach whatever is attached to a pipeline or transformer; nothing happens if there is nothing."""
    # a pipeline may have other transformers by now than those that the driver was attached to
    for marked in (*map(unwrap_module, find_transformers(target).values()), target):
        attachment = vars(marked).get(ATTRIBUTE)
        if attachment is not None:
            attachment.disable()


class HookedTransformer:
    """The hooks on one transformer. They follow the transformer when its modules change.

    Args:
        transformer: of a pipeline, or a bare one.
        component: its name in the pipeline.
        clock: tells the step of a call.
        driver: decides what each call does.
        lock: held during each call, since all hooks share one state.

    Raises:
        ValueError: if the transformer has another cache enabled, or no blocks or head can be found; nothing is
            changed then.
    """

    def __init__(self, transformer: nn.Module, component: str, clock: StepClock, driver: Driver, lock: RLock) -> None:
        self.state = SkipState(driver)
        self._transformer = inner = unwrap_module(transformer)
        refuse_caches(inner, inner.modules())
        self.structure = Structure(inner)
        self._undo: list[Callable[[], None]] = []
        self._undo_heads: list[Callable[[], None]] = []
        self._undo_blocks: list[Callable[[], None]] = []
        try:
            self._hook(transformer, component, clock, lock)
        except BaseException:
            self.remove()
            raise

    def _hook(self, transformer: nn.Module, component: str, clock: StepClock, lock: RLock) -> None:
        inner, contexts = self._transformer, CacheContexts()
        hook = TransformerHook(self, inner, component, clock, contexts, lock)
        registry = HookRegistry.check_if_exists_or_initialize(inner)
        registry.register_hook(CacheContextHook(contexts, hook.reset), HOOK)
        self._undo.append(self._remove_context_hook)
        refresh_hooks(inner)
        if self.structure.output_head is None:
            self.hook_blocks()
        self._undo_heads = hook_heads(self.state, self.structure.heads)
        self._undo.append(intercept(transformer, hook))  # the compiled wrapper, if there is one
        # Attributes of the instance come before those of its class. Pipelines call the first one at their end if it
        # exists; models with a cache of their own have it already.
        if not hasattr(inner, "_reset_stateful_cache"):
            self._set("_reset_stateful_cache", hook.reset)
        if hasattr(inner, "enable_cache"):
            self._set("enable_cache", refuse_enable_cache)

    def _set(self, name: str, value: Callable[..., None]) -> None:
        setattr(self._transformer, name, value)
        self._undo.append(lambda: vars(self._transformer).pop(name, None) and None)

    def _remove_context_hook(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(HOOK, recurse=False)
        refresh_hooks(self._transformer)

    def hook_blocks(self) -> None:
        """Hook the blocks, once and only if needed: a predicted step of a known output head runs no forward."""
        self._undo_blocks = self._undo_blocks or hook_blocks(self.state, self.structure.blocks)

    def update(self) -> None:
        """Put the hooks on the modules that the transformer has now.

        Raises:
            ValueError: if another cache was enabled meanwhile, or no blocks or head are left.
        """
        before, self.structure = self.structure, Structure(self._transformer)
        refuse_caches(self._transformer, self.structure.parts)
        self.state.split = is_split(self.structure.parts)
        if self.structure.heads != before.heads:
            _undo_all(self._undo_heads)
            self._undo_heads = hook_heads(self.state, self.structure.heads)
        # under context parallelism predicted steps need the forward, and blocks what they note on a full one
        needed = bool(self._undo_blocks) or self.structure.output_head is None or self.state.split
        if self.structure.blocks != before.blocks:
            _undo_all(self._undo_blocks)
        if needed:
            self.hook_blocks()

    def remove(self) -> None:
        """Restore the transformer exactly."""
        for undo in (self._undo, self._undo_heads, self._undo_blocks):
            _undo_all(undo)


def _undo_all(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def refuse_enable_cache(config: Any) -> None:
    """In place of ``transformer.enable_cache``."""
    raise ValueError(
        "lesa is enabled on this transformer and another cache would undo it; call lesa.disable(...) first"
    )
