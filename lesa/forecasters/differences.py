"""Backward differences of the full features, which most published formulas use as derivatives.

At each full step, with the features and differences of the full step before it,

    D_0 = feature,   D_{i+1} = (D_i - D_i at the full step before) / distance to it
"""

from typing import Literal

import torch
from torch import Tensor

from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times

Variable = Literal["step", "time"]  # what distances are measured in


def positions(plan: StepPlan, times: Tensor, variable: Variable) -> Tensor:
    """The index or the time of each step and of the end, [steps + 1]."""
    times = as_times(times, plan.num_steps)
    return times if variable == "time" else torch.arange(plan.num_steps + 1, dtype=torch.float64)


def check_variable(variable: str) -> None:
    """Raises ValueError for what is not a :data:`Variable`."""
    if variable not in ("step", "time"):
        raise ValueError(f"variable must be 'step' or 'time', not {variable!r}")


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
