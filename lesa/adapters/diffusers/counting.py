"""Counts the steps of schedulers that do not count them (DDIM, DDPM, PNDM)."""

import functools
from typing import Any

from lesa.adapters.diffusers.derived_class import derived_class


@functools.cache
def _counting(kind: Any) -> type:
    """A scheduler class whose ``step`` counts."""

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        self.steps_taken += 1
        return result

    return derived_class(kind, "steps_taken", step=step, counts_steps=True)


def is_counted(scheduler: Any) -> bool:
    """Whether :func:`count_steps` was called on this scheduler, and not only on the one that it was copied from."""
    return hasattr(type(scheduler), "counts_steps")


def count_steps(scheduler: Any) -> None:
    """Let a scheduler count its steps in ``steps_taken``."""
    kind: Any = type(scheduler)
    scheduler.steps_taken = 0
    scheduler.__class__ = _counting(kind)


def stop_counting(scheduler: Any) -> None:
    """Undo :func:`count_steps`."""
    scheduler.__class__ = type(scheduler).__mro__[1]
    del scheduler.steps_taken
