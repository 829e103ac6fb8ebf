"""The branch of guidance that a call of a transformer belongs to."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lesa.adapters.diffusers.clock import Moment

MOST = 8  # calls of a step; more are a scheduler that does not go on
Conditions = tuple[tuple[int, tuple[int, ...]], ...]


class Branches:
    """Names calls ``call0``, ``call1``, ... where the pipeline gives no name.

    A branch is known again by its conditions, the tensors that it is called with beside the latents: guidance may
    start or end part-way, so that the first call of a step is not always of the same branch. They are compared by
    address, and held so that no other tensor can have it. Where a pipeline copies them for every step, which is found
    out by comparing values once, the order of calls tells.

    Args:
        changing: the arguments that are new at every step, the latents and the time.
    """

    def __init__(self, changing: Collection[str]) -> None:
        self._changing = changing
        self._generation: object = None
        self._step = -1
        self._called: list[str] = []  # in this step
        self._known: dict[str, tuple[Conditions, list[Tensor]]] = {}
        self._copied: set[str] = set()  # branches whose conditions are copied for every step

    def name(self, moment: Moment, arguments: dict[str, Any]) -> str:
        """The branch of a call with these arguments."""
        if moment.generation is not self._generation:
            self.forget()
        if moment.generation is not self._generation or moment.step != self._step:
            self._generation, self._step = moment.generation, moment.step
            self._called.clear()
        tensors = list(self._conditions(arguments))
        conditions = tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors)
        free = [name for name in self._known if name not in self._called]
        name = next((name for name in free if self._known[name][0] == conditions), None)
        if name is None:
            name = f"call{min(len(self._called), MOST - 1)}"
            if name in self._called or not self._may_be(name, tensors):
                name = f"call{min(len(self._known), MOST - 1)}"
        self._called.append(name)
        self._known[name] = conditions, tensors
        return name

    def _may_be(self, name: str, tensors: list[Tensor]) -> bool:
        """Whether a call with these conditions, seen for the first time, can be of the branch whose turn it is.

        Conditions of other shapes can: nothing that was kept under others is used with them.
        """
        if name not in self._known or name in self._copied:
            return True
        before = self._known[name][1]
        if [tensor.shape for tensor in before] != [tensor.shape for tensor in tensors]:
            return True
        if all(map(torch.equal, before, tensors)):
            self._copied.add(name)
        return name in self._copied

    def forget(self) -> None:
        """The generation is over."""
        self._generation = None
        self._called.clear()
        self._known.clear()
        self._copied.clear()

    def _conditions(self, arguments: dict[str, Any]) -> Iterator[Tensor]:
        for name, value in arguments.items():
            if name not in self._changing:
                for part in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(part, Tensor):
                        yield part
