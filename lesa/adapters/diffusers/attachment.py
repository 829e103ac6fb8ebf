"""A driver's hooks on one transformer."""

from collections.abc import Callable

from torch import nn

from lesa.adapters.diffusers.clock import Clock
from lesa.adapters.diffusers.compat import HookRegistry, active_cache, refresh_hooks, unwrap_module
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
        cache = active_cache(inner)
        if cache is not None:
            raise ValueError(
                f"a cache of diffusers is enabled on this transformer ({type(cache).__name__}); two caches would undo "
                "each other: call transformer.disable_cache() first"
            )
        heads, self._blocks = find_heads(inner), find_blocks(inner)
        self._transformer = inner
        self._control, receiver = Control(driver), Receiver(driver)
        root = Root(self._control, inner, component, clock, receiver, next(iter(heads)), self._hook_blocks)
        HookRegistry.check_if_exists_or_initialize(inner).register_hook(receiver, RECEIVER)
        refresh_hooks(inner)
        self._undo: list[Callable[[], None]] = []  # of the blocks
        if find_ending(inner) is None:
            self._hook_blocks()
        self._restore = [*hook_heads(self._control, heads), intercept(transformer, root)]
        # Pipelines call this at their end if it exists; models with a cache of their own have it already.
        self._adds_reset = not hasattr(inner, "_reset_stateful_cache")
        if self._adds_reset:
            inner._reset_stateful_cache = driver.reset

    def _hook_blocks(self) -> None:
        """Once, and only if needed: where the end of a model is known its blocks are left alone."""
        self._undo = self._undo or hook_blocks(self._control, self._blocks)

    def remove(self) -> None:
        """Restore the transformer exactly."""
        for undo in reversed(self._undo + self._restore):
            undo()
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(RECEIVER, recurse=False)
        refresh_hooks(self._transformer)
        if self._adds_reset:
            del self._transformer._reset_stateful_cache
