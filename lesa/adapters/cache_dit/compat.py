"""Every private name of cache-dit that this library touches, and nothing else.

cache-dit makes its calibrators in a factory with a fixed list of types. The module attribute with that factory is
replaced by a factory that also knows ours.
"""

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, ClassVar

__all__ = ["CalibratorBase", "CalibratorConfig", "check", "install"]

TESTED = "1.5.3"
METHODS = ("reset_cache", "mark_step_begin", "update", "approximate")
FIELDS = {
    "enable_calibrator",
    "enable_encoder_calibrator",
    "calibrator_type",
    "calibrator_cache_type",
    "calibrator_kwargs",
}


def changed(what: str) -> ImportError:
    """ImportError for a cache-dit that is missing or not supported."""
    try:
        installed = version("cache-dit")
    except PackageNotFoundError:
        return ImportError("cache-dit is not installed: pip install 'lesa[cache-dit]'")
    return ImportError(
        f"cache-dit {installed} is not as lesa knows it from {TESTED}: {what}. Install that one "
        f"(pip install 'cache-dit=={TESTED}'), or a lesa that knows this one"
    )


try:
    from cache_dit.caching.cache_contexts import cache_context
    from cache_dit.caching.cache_contexts.calibrators import CalibratorBase, CalibratorConfig
except ImportError as error:
    raise changed(str(error)) from error


def check(module: ModuleType, base: type, config: type) -> None:
    """Check that this version of cache-dit makes and calls calibrators as expected.

    Args:
        module: where contexts make their calibrators.
        base: of all calibrators.
        config: of all configurations of calibrators.

    Raises:
        ImportError: that names what has changed.
    """
    if not callable(getattr(module, "Calibrator", None)):
        raise changed("its contexts have no factory of calibrators")
    made = getattr(getattr(module, "CachedContext", None), "__post_init__", None)
    if made is None or "Calibrator" not in made.__code__.co_names:
        raise changed("its contexts make their calibrators in another way")
    if missing := [method for method in METHODS if not hasattr(base, method)]:
        raise changed(f"its calibrators have no {', '.join(missing)}")
    if missing := sorted(FIELDS - {field.name for field in dataclasses.fields(config)}):
        raise changed(f"its configurations have no {', '.join(missing)}")


def install(kind: str, calibrator: type[CalibratorBase]) -> None:
    """Have cache-dit make ``calibrator`` for configurations of type ``kind``; a second time does nothing.

    Raises:
        ImportError: if cache-dit has changed so that this cannot be done.
    """
    check(cache_context, CalibratorBase, CalibratorConfig)
    theirs: Any = cache_context.Calibrator
    if hasattr(theirs, "ours"):
        theirs.ours[kind] = calibrator
        return

    class Factory(theirs):
        """The factory of cache-dit, with ours."""

        ours: ClassVar[dict[str, type[CalibratorBase]]] = {kind: calibrator}

        def __new__(cls, calibrator_config: CalibratorConfig) -> CalibratorBase:
            make = cls.ours.get(calibrator_config.calibrator_type)
            made: CalibratorBase = make(**calibrator_config.to_kwargs()) if make else theirs(calibrator_config)
            return made

    cache_context.Calibrator = Factory
