"""Changes one method of one scheduler: its class becomes a derived one."""

from collections.abc import Callable
from typing import Any


def derived_class(kind: Any, attribute: str, **names: Any) -> type:
    """A class derived from ``kind`` with other ``names``; copies and pickles of its instances are of the plain class.

    Args:
        attribute: what the derived class keeps on an instance, which copies do not get.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _new, (kind,), {name: value for name, value in vars(self).items() if name != attribute}

    inherited: dict[str, Callable[..., Any]] = {"__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), {**inherited, "__module__": kind.__module__, **names})


def _new(kind: Any) -> Any:
    return kind.__new__(kind)
