"""What diffusers tells a hook of its own kind."""

from collections.abc import Callable

from torch import nn

from lesa.adapters.diffusers.compat import CacheContexts, ModelHook


class Receiver(ModelHook):
    """Changes nothing; diffusers tells it the current cache context and the end of each pipeline call.

    Args:
        manager: is told the context.
        reset: is called at the end.
    """

    _is_stateful = True

    def __init__(self, manager: CacheContexts, reset: Callable[[], None]) -> None:
        super().__init__()
        self.manager = manager  # found by cache_context() among the attributes of stateful hooks
        self.reset = reset

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.reset()
        return module
