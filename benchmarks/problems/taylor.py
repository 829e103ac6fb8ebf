"""A Taylor prediction of order 2 by our table, by cache-dit's calibrator and by diffusers' hook.

The others keep differences of features and add three terms; ours combines three features. All have the same three full
steps, two steps apart, and predict the step after the last one.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.problem import COPY, OURS, REFERENCE, Problem, copier, relative_error, some
from benchmarks.shapes import Shape
from lesa import StepPlan, Taylor
from lesa_kernels import combine
from lesa_kernels.ops.combine import reference

ORDER, FULL = 2, (0, 2, 4)
PROVIDERS = (OURS, REFERENCE, "cache-dit", "diffusers", COPY)


def taylor(shape: Shape, device: str, backend: str = "auto") -> Problem:
    """One predicted step."""
    plan = StepPlan(6, FULL)
    table = Taylor(ORDER).table(plan, torch.linspace(1, 0, 7)).coefficients[-1:]
    exact_table, coefficients = table.to(device), table.float().to(device)
    functions: dict[str, Callable[..., Any]] = {
        OURS: lambda history, *_: combine(history, coefficients, backend=backend)[0],
        REFERENCE: lambda history, *_: reference.combine(history, coefficients, None)[0],
        COPY: copier((len(FULL) + 1) * shape.nbytes, device),
    }
    if find_spec("cache_dit") and find_spec("diffusers"):
        functions["cache-dit"] = lambda history, theirs, _: theirs.approximate()
    if find_spec("diffusers"):
        functions["diffusers"] = lambda history, _, theirs: theirs.predict()[0]

    def make() -> tuple[Any, ...]:
        history = torch.randn(len(FULL), *shape.feature, device=device).to(shape.dtype)
        return history, _cache_dit(history), _diffusers(history)

    def error(inputs: tuple[Any, ...], result: Tensor) -> float:
        part = some(shape.tokens)
        exact = torch.einsum("pm,m...->p...", exact_table, inputs[0][:, :, part].double())[0]
        return relative_error(result[:, part], exact)

    return Problem(
        operation="Taylor 2",
        direction="forward",
        shape=shape.name,
        nbytes=(len(FULL) + 1) * shape.nbytes,
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )


def _cache_dit(history: Tensor) -> Any:
    """cache-dit's state of one stream after the full steps, at the predicted step."""
    if not (find_spec("cache_dit") and find_spec("diffusers")):
        return None
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    state = TaylorSeerState(n_derivatives=ORDER)
    for step in range(FULL[-1] + 2):
        state.mark_step_begin()
        if step in FULL:
            state.update(history[FULL.index(step)])
    return state


def _diffusers(history: Tensor) -> Any:
    """The same for diffusers' state of one module, with factors in the dtype of the feature."""
    if not find_spec("diffusers"):
        return None
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    state = TaylorSeerState(taylor_factors_dtype=history.dtype, max_order=ORDER)
    for step in range(FULL[-1] + 2):
        state.current_step = step
        if step in FULL:
            state.update((history[FULL.index(step)],))
    return state
