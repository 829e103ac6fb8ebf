"""The caches of diffusers on the same models, compared with lesa by one measure.

All steps of a generation get the same inputs, so that the true feature is the same at every step and any correct cache
must give the outputs of full steps. The caches differ in how much of the blocks still runs at a step that they skip.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch

import lesa
from lesa import Taylor
from tests.lesa.adapters.diffusers.models.check import BRANCHES, PLAN, STEPS, BlockRuns, Loop, error
from tests.lesa.adapters.diffusers.models.row import Row

MAX_ERROR = 1e-3  # relative error in float32; a cache that fails here has an error above 0.1


def taylor_seer(lite: bool) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
    )


CACHES: dict[str, Callable[[], Any]] = {
    "TaylorSeer": lambda: taylor_seer(lite=False),
    "TaylorSeer, lite": lambda: taylor_seer(lite=True),
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: diffusers.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.3
    ),
}


def outcome_of_lesa(name: str, row: Row) -> dict[str, Any]:
    """The result of :func:`outcome_of` for lesa."""
    loop = Loop(name, row)
    return _outcome(loop, lambda: lesa.enable(loop, Taylor(1), PLAN))


def outcome_of(cache: str, name: str, row: Row) -> dict[str, Any]:
    """``{"runs": share of the modules in blocks that run at the cheapest step, "error": ...}``, or why it fails."""
    loop = Loop(name, row)
    if not hasattr(loop.transformer, "enable_cache"):
        return {"refused": "the class takes no cache"}
    if cache.split(",")[0] + "Config" not in dir(diffusers) and cache.split(",")[0] + "CacheConfig" not in dir(
        diffusers
    ):
        return {"refused": "this version of diffusers has no such cache"}
    return _outcome(loop, lambda: loop.transformer.enable_cache(CACHES[cache]()))


def _outcome(loop: Loop, enable: Callable[[], object]) -> dict[str, Any]:
    """The share of blocks that run and the error, after ``enable`` was called."""
    untouched = loop(constant=True)
    runs = BlockRuns(loop.transformer, loop.row.embedders)
    loop(constant=True, each=runs.store)
    all_of_them = {branch: runs.stored[0, branch] for branch in BRANCHES}
    try:
        enable()
    except Exception as problem:
        return {"refused": _first_line(problem)}
    try:
        outputs = loop(constant=True, each=runs.store)
    except Exception as problem:
        return {"fails": _first_line(problem)}
    fewest = min(runs.stored[step, branch] / all_of_them[branch] for step in range(STEPS) for branch in BRANCHES)
    return {"runs": round(fewest, 3), "error": error(outputs, untouched)}


def _first_line(problem: Exception) -> str:
    text = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
