"""A driver's hooks on one transformer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lesa.adapters.diffusers.clock import Clock
from lesa.adapters.diffusers.compat import HookRegistry, StateManager, refresh_hooks, refuse_caches, unwrap_module
from lesa.adapters.diffusers.discovery import find_blocks, find_heads
from lesa.adapters.diffusers.endings import find_ending
from lesa.adapters.diffusers.receiver import Receiver
from lesa.adapters.diffusers.root import Root
from lesa.adapters.hooks import Control, hook_blocks, hook_heads
from lesa.adapters.interception import intercept
from lesa.runtime.driver import Driver

RECEIVER = "lesa_receiver"


class Attachment:
    """Puts them on; :meth:`remove` takes all of them off again.

    Raises:
        ValueError: if the transformer has another cache enabled, or no blocks or head can be found; nothing is
            changed then.
    """

    def __init__(self, transformer: nn.Module, component: str, clock: Clock, driver: Driver) -> None:
        inner = unwrap_module(transformer)
        refuse_caches(inner, inner.modules())
        heads, self._blocks = find_heads(inner), find_blocks(inner)
        self._transformer = inner
        self._control, contexts = Control(driver), StateManager(object)
        root = Root(self._control, inner, component, clock, contexts, next(iter(heads)), self._hook_blocks)
        receiver = Receiver(contexts, root.reset)
        HookRegistry.check_if_exists_or_initialize(inner).register_hook(receiver, RECEIVER)
        refresh_hooks(inner)
        self._undo: list[Callable[[], None]] = []  # of the blocks
        if find_ending(inner) is None:
            self._hook_blocks()
        self._restore = [*hook_heads(self._control, heads), intercept(transformer, root)]
        # Attributes of the instance that stand before those of its class. Pipelines call the one at their end if it
        # exists; models with a cache of their own have it already.
        self._covered: dict[str, Callable[..., None]] = {}
        if not hasattr(inner, "_reset_stateful_cache"):
            self._covered["_reset_stateful_cache"] = root.reset
        if hasattr(inner, "enable_cache"):
            self._covered["enable_cache"] = refuse_enable_cache
        for name, value in self._covered.items():
            setattr(inner, name, value)

    def _hook_blocks(self) -> None:
        """Once, and only if needed: where the end of a model is known its blocks are left alone."""
        self._undo = self._undo or hook_blocks(self._control, self._blocks)

    def remove(self) -> None:
        """Restore the transformer exactly."""
        for undo in reversed(self._undo + self._restore):
            undo()
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(RECEIVER, recurse=False)
        refresh_hooks(self._transformer)
        for name in self._covered:
            delattr(self._transformer, name)
        self._covered = {}


def refuse_enable_cache(config: Any) -> None:
    """In place of ``transformer.enable_cache``."""
    raise ValueError(
        "lesa is enabled on this transformer and another cache would undo it; call lesa.disable(...) first"
    )
