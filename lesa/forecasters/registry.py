"""Forecasters by name, for the command line and for methods that other projects add."""

import inspect
from collections.abc import Callable
from typing import Any

from lesa.tables.forecaster import Forecaster

_factories: dict[str, Callable[..., Forecaster]] = {}


def register_forecaster(name: str, factory: Callable[..., Forecaster]) -> None:
    """Make ``factory`` known by name, to :func:`make_forecaster` and the command line.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _factories:
        raise ValueError(f"a forecaster named {name!r} is registered already")
    _factories[name] = factory


def registered() -> tuple[str, ...]:
    """The names that are registered, sorted."""
    return tuple(sorted(_factories))


def make_forecaster(name: str, **options: Any) -> Forecaster:
    """The forecaster registered under ``name``, made with ``options``.

    Raises:
        ValueError: for an unknown name, or an option that this forecaster does not have.
    """
    if name not in _factories:
        raise ValueError(f"no forecaster named {name!r}; known are {', '.join(registered())}")
    try:
        inspect.signature(_factories[name]).bind(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r:.40}" for key, value in options.items()) or "no options"
        raise ValueError(
            f"{name} cannot be made with {given}: {error}; its options are {inspect.signature(_factories[name])}"
        ) from error
    return _factories[name](**options)
