"""Conditions: whether a transformer is still called with the values that features and outputs were computed for."""

from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]  # of a transformer's forward, by name
Place = tuple[str | int, ...]  # of a value in the arguments: the name of one, and where in it
Signature = tuple[tuple[Place, torch.Size, torch.dtype], ...]
ABSENT = object()


class Condition:
    """A tensor that a transformer was called with.

    The same memory, not written to since, has the same values. Inference tensors do not count writes, and a pipeline
    may create its tensors again for every step; then the values are compared with a private copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach().clone()
        self._remember(tensor)

    def _remember(self, tensor: Tensor) -> None:
        self._tensor = tensor  # a reference, so that its memory is not given to another tensor
        self._version = _version(tensor)

    def is_in(self, tensor: Tensor) -> bool:
        """Whether a tensor uses the same memory and nothing was written to it; no value is read."""
        known = self._tensor
        if tensor is not known and not _is_same_memory(tensor, known):
            return False
        return self._version is not None and _version(tensor) == self._version and _version(known) == self._version

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same values."""
        if self.is_in(tensor):
            return True
        if not self.has_shape_of(tensor) or tensor.device != self._values.device:
            return False
        if not tensor.is_meta and not torch.equal(tensor, self._values):
            return False
        self._remember(tensor)
        return True

    def has_shape_of(self, tensor: Tensor) -> bool:
        """Whether a tensor could have the same values."""
        return tensor.shape == self._values.shape and tensor.dtype == self._values.dtype


class Conditions:
    """All arguments of a call except those that are new at every step.

    Tensors inside lists, tuples and dictionaries are included, and so are other values that can be compared, such as
    the scale of a LoRA or the mode of a cache. For objects that compare by identity only (a mask created again for
    every step, a cache of keys) the class is compared.

    Args:
        arguments: of the call.
        step_arguments: the names of the arguments that are new at every step.
    """

    def __init__(self, arguments: Arguments, step_arguments: Collection[str]) -> None:
        self._step_arguments = step_arguments
        self._known: dict[Place, Any] = {
            place: Condition(value) if isinstance(value, Tensor) else value
            for place, value in _leaves(arguments, step_arguments)
        }

    def are_in(self, arguments: Arguments) -> bool:
        """Whether all tensors use the same unwritten memory and all other values are equal; no tensor is read."""
        return self._agree(arguments, Condition.is_in)

    def are_still(self, arguments: Arguments) -> bool:
        """Whether a call has the same conditions, by value."""
        return self._agree(arguments, Condition.is_still)

    def have_shapes_of(self, arguments: Arguments) -> bool:
        """Whether a call has as many tensors in the same places, of the same shapes."""
        tensors = {
            place: value for place, value in _leaves(arguments, self._step_arguments) if isinstance(value, Tensor)
        }
        known = {place: value for place, value in self._known.items() if isinstance(value, Condition)}
        return tensors.keys() == known.keys() and all(known[p].has_shape_of(t) for p, t in tensors.items())

    def _agree(self, arguments: Arguments, agrees: Callable[[Condition, Tensor], bool]) -> bool:
        count = 0
        for place, value in _leaves(arguments, self._step_arguments):  # runs at every step, so it is kept simple
            known = self._known.get(place, ABSENT)
            if isinstance(value, Tensor):
                if not isinstance(known, Condition) or not agrees(known, value):
                    return False
            elif known is not value and not _is_same_value(known, value):
                return False
            count += 1
        return count == len(self._known)


def signature_of(arguments: Arguments) -> Signature:
    """Shapes and dtypes of all tensors of a call; features of different signatures are never combined."""
    return tuple(
        (place, value.shape, value.dtype) for place, value in _leaves(arguments, ()) if isinstance(value, Tensor)
    )


def _leaves(arguments: Arguments, skipped: Collection[str]) -> Iterator[tuple[Place, Any]]:
    for name, value in arguments.items():
        if name not in skipped:
            if isinstance(value, dict | list | tuple):
                yield from _inside((name,), value)
            else:
                yield (name,), value


def _inside(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield place, value
        return
    yield place, len(value)
    for key, part in items:
        yield from _inside((*place, key), part)


def _is_same_value(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    equal: object = type(a).__eq__
    if equal is object.__eq__:
        return not isinstance(a, Enum)
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # an array, which has no single truth value
        return False


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (
        a.layout is torch.strided
        and b.layout is torch.strided
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr() != 0
    )


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version
