"""What diffusers tells a hook of its own kind."""

from torch import nn

from lesa.adapters.diffusers.compat import ModelHook, StateManager
from lesa.runtime.driver import Driver


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
