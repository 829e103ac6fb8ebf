"""Answering the calls of one module instance."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def intercept(module: nn.Module, answer: Answer) -> Callable[[], None]:
    """Let ``answer(forward, args, kwargs)`` answer every call of one module; returns what undoes it.

    The instance's class becomes a subclass of itself. A replaced ``forward`` would be lost when accelerate puts an
    older one back, a forward hook cannot keep the forward from running, and a module that was compiled stays so.

    Others do the same on top (FSDP2, parametrisation). Their class keeps ours among its bases after the undoing; it
    then finds no answer on the instance, and a call is what it was before.
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
    """The subclass: one for all instances, since torch.compile makes code for each class anew."""

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
