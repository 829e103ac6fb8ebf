"""Backward differences of the full features, which most published formulas use as derivatives.

At each full step, with the features and differences of the full step before it,

    D_0 = feature,   D_{i+1} = (D_i - D_i at the full step before) / distance to it
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll
from lesa.tables.times import as_times

Variable = Literal["step", "time"]  # what distances are measured in


def check_variable(variable: str) -> None:
    """Raises ValueError for what is not a :data:`Variable`."""
    if variable not in ("step", "time"):
        raise ValueError(f"variable must be 'step' or 'time', not {variable!r}")


def difference_table(
    plan: StepPlan, times: Tensor, variable: Variable, order: int, factors: Callable[[float], list[float]]
) -> CoefficientTable:
    """The table of ``feature = sum_i factors(x)[i] D_i`` at a distance x after the last full step.

    Of the factors, [order + 1], the first predictions use as many as there are differences.
    """
    levels = as_times(times, plan.num_steps)
    position = levels if variable == "time" else torch.arange(plan.num_steps + 1, dtype=torch.float64)

    def rule(step: int, rows: list[Tensor]) -> Tensor:
        last = last_full(plan, step)
        derivatives = differences(plan, position, rows, last, order)
        weights = factors(float(position[step] - position[last]))
        return torch.stack([d * weight for d, weight in zip(derivatives, weights, strict=False)]).sum(0)

    return unroll(plan, times, rule)


def differences(plan: StepPlan, position: Tensor, rows: list[Tensor], step: int, order: int) -> list[Tensor]:
    """D_0 ... D_order at the full step ``step``, or as many as there are."""
    result, slot = [rows[step]], plan.full_steps.index(step)
    if slot > 0 and order > 0:
        previous = plan.full_steps[slot - 1]
        distance = position[step] - position[previous]
        # two steps at one time (second-order solvers) have no slope between them
        earlier = differences(plan, position, rows, previous, order - 1) if distance != 0 else []
        for i, old in enumerate(earlier):
            result.append((result[i] - old) / distance)
    return result


def last_full(plan: StepPlan, step: int) -> int:
    """The full step that a prediction of ``step`` starts from."""
    return max(full for full in plan.full_steps if full < step)
