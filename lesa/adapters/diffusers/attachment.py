"""A driver's hooks on one transformer."""

from collections.abc import Callable
from threading import RLock
from typing import Any

from torch import nn

from lesa.adapters.diffusers.clock import Clock
from lesa.adapters.diffusers.compat import (
    CacheContexts,
    HookRegistry,
    is_split,
    refresh_hooks,
    refuse_caches,
    unwrap_module,
)
from lesa.adapters.diffusers.receiver import Receiver
from lesa.adapters.diffusers.root import Root
from lesa.adapters.diffusers.structure import Structure
from lesa.adapters.hooks import Control, hook_blocks, hook_heads
from lesa.adapters.interception import intercept
from lesa.runtime.driver import Driver

RECEIVER = "lesa_receiver"


class Attachment:
    """Puts them on, and follows the transformer when its modules change; :meth:`remove` takes all of them off again.

    Args:
        transformer: of a pipeline, or a bare one.
        component: its name in the pipeline.
        clock: tells the moment of a call.
        driver: decides what becomes of it.
        lock: held during each call, since all hooks look at one state.

    Raises:
        ValueError: if the transformer has another cache enabled, or no blocks or head can be found; nothing is
            changed then.
    """

    def __init__(self, transformer: nn.Module, component: str, clock: Clock, driver: Driver, lock: RLock) -> None:
        self.control = Control(driver)
        self._transformer = inner = unwrap_module(transformer)
        refuse_caches(inner, inner.modules())
        self.structure = Structure(inner)
        self._undo: list[Callable[[], None]] = []
        self._undo_heads: list[Callable[[], None]] = []
        self._undo_blocks: list[Callable[[], None]] = []
        try:
            self._put_on(transformer, component, clock, lock)
        except BaseException:
            self.remove()
            raise

    def _put_on(self, transformer: nn.Module, component: str, clock: Clock, lock: RLock) -> None:
        inner, contexts = self._transformer, CacheContexts()
        root = Root(self, inner, component, clock, contexts, lock)
        registry = HookRegistry.check_if_exists_or_initialize(inner)
        registry.register_hook(Receiver(contexts, root.reset), RECEIVER)
        self._undo.append(self._remove_receiver)
        refresh_hooks(inner)
        if self.structure.ending is None:
            self.hook_blocks()
        self._undo_heads = hook_heads(self.control, self.structure.heads)
        self._undo.append(intercept(transformer, root))  # the compiled wrapper, if there is one
        # Attributes of the instance that stand before those of its class. Pipelines call the one at their end if it
        # exists; models with a cache of their own have it already.
        if not hasattr(inner, "_reset_stateful_cache"):
            self._cover("_reset_stateful_cache", root.reset)
        if hasattr(inner, "enable_cache"):
            self._cover("enable_cache", refuse_enable_cache)

    def _cover(self, name: str, value: Callable[..., None]) -> None:
        setattr(self._transformer, name, value)
        self._undo.append(lambda: vars(self._transformer).pop(name, None) and None)

    def _remove_receiver(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(RECEIVER, recurse=False)
        refresh_hooks(self._transformer)

    def hook_blocks(self) -> None:
        """Once, and only if needed: where the end of a model is known its blocks are left alone."""
        self._undo_blocks = self._undo_blocks or hook_blocks(self.control, self.structure.blocks)

    def look_again(self) -> None:
        """Put the hooks on the modules that are there now.

        Raises:
            ValueError: if another cache was enabled meanwhile, or no blocks or head are left.
        """
        before, self.structure = self.structure, Structure(self._transformer)
        refuse_caches(self._transformer, self.structure.parts)
        self.control.split = is_split(self.structure.parts)
        if self.structure.heads != before.heads:
            _undo_all(self._undo_heads)
            self._undo_heads = hook_heads(self.control, self.structure.heads)
        # under context parallelism predicted steps need the forward, and blocks what they learn on a full one
        needed = bool(self._undo_blocks) or self.structure.ending is None or self.control.split
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
