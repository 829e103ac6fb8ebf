"""TaylorSeer: a Taylor expansion whose derivatives are differences of the latest full features.

Source: Liu et al., "From Reusing to Forecasting", https://arxiv.org/abs/2503.06923. At each full step

    D_0 = feature,   D_{i+1} = (D_i - D_i at the previous full step) / distance to it

and at a predicted step a distance x after the last full one, feature = sum_i D_i x^i / i!. Distances count steps.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lesa.plan import StepPlan
from lesa.schedule import as_times
from lesa.table import CoefficientTable, unroll


@dataclass(frozen=True)
class Taylor:
    """TaylorSeer of some order; the first predictions use as many differences as there are.

    Args:
        order: the highest derivative; 0 is reuse.
        variable: what distances are measured in, ``"step"`` as published or ``"time"``.
    """

    order: int = 2
    variable: Literal["step", "time"] = "step"

    def __post_init__(self) -> None:
        if self.order < 0:
            raise ValueError(f"the order of a Taylor expansion is at least 0, not {self.order}")
        if self.variable not in ("step", "time"):
            raise ValueError(f"variable must be 'step' or 'time', not {self.variable!r}")

    @property
    def needs_times(self) -> bool:
        return self.variable == "time"

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        times = as_times(times, plan.num_steps)
        position = times if self.variable == "time" else torch.arange(plan.num_steps + 1, dtype=torch.float64)

        def differences(step: int, rows: list[Tensor]) -> list[Tensor]:
            """D_0, D_1, ... at the full step ``step``."""
            result, slot = [rows[step]], plan.full_steps.index(step)
            if slot > 0:
                previous = plan.full_steps[slot - 1]
                distance = position[step] - position[previous]
                # two steps at one time (second-order solvers) have no slope between them
                earlier = differences(previous, rows)[: self.order] if distance != 0 else []
                for i, old in enumerate(earlier):
                    result.append((result[i] - old) / distance)
            return result

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            last = max(full for full in plan.full_steps if full < step)
            x = position[step] - position[last]
            terms = (d * x**i / math.factorial(i) for i, d in enumerate(differences(last, rows)))
            return torch.stack(list(terms)).sum(0)

        return unroll(plan, times, rule)
