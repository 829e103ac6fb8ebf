"""Checks of what users pass: one sentence that names the argument and says what it should be."""

import math
import operator
from typing import Any


def whole(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number within bounds; a float, a bool and anything else is refused.

    Raises:
        ValueError: that names the argument.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name} must be a whole number{_bounds(least, most)}, not {value!r:.80}")
    return number


def real(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """A finite number within bounds; a bool and anything else is refused.

    Raises:
        ValueError: that names the argument.
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    fits = (
        math.isfinite(number)
        and (above is None or number > above)
        and (least is None or number >= least)
        and (most is None or number <= most)
    )
    if not fits:
        bounds = f" above {above:g}" if above is not None else ""
        raise ValueError(f"{name} must be a number{bounds}{_bounds(least, most)}, not {value!r:.80}")
    return number


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    return f" of at least {least:g}" if least is not None else f" of at most {most:g}" if most is not None else ""
