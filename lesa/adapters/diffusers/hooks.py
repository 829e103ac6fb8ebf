"""Hooks on the modules of a transformer, by one recipe for all models.

While the control says skip, each block hands its inputs through, and the head, the final norm, gets the driver's
prediction in place of what came through. On a full step the head's input is the feature that is kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lesa.adapters.diffusers.compat import ModelHook, StateManager
from lesa.runtime.driver import Driver


class Control:
    """What the hooks of one transformer share. ``skip`` is a plain bool, which compiled blocks are guarded on."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.inside = False  # between the root's hooks, under a driver that has been asked
        self.skip = False
        self.dtype: torch.dtype | None = None  # that the transformer is called with


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
            # Wan's family widens the feature to float32 for its norm: what is kept need not be
            control.driver.keep(self.name, feature if control.dtype is None else feature.to(control.dtype))
            return None
        prediction = control.driver.predict(self.name).to(feature.dtype)
        return ((prediction, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: prediction})
