"""What a forecaster is, and the registry by name."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lesa.plan import StepPlan
from lesa.table import CoefficientTable


@runtime_checkable
class Forecaster(Protocol):
    """Anything that turns a plan and the times of a generation into a table of coefficients.

    One that only counts steps may say so with an attribute ``needs_times = False``; then it also serves a bare
    transformer whose schedule nobody knows. One that looks back on a fixed number of full features, whatever the plan,
    may say so with ``reach``; then no more are kept where the plan is not known beforehand.
    """

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        """The table for this plan; ``times`` [steps + 1] are noise levels from 1 to 0."""
        ...


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
    """The names that are known."""
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
