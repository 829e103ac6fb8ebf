"""Coefficient tables: each predicted step as a linear combination of full features."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times, difference, same_times


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """``feature[s] = sum_j coefficients[s, j] * full_feature[j] + bias[s]`` for every predicted step s.

    Args:
        plan: its predicted steps are the rows, its full steps the columns.
        times: the schedule that the coefficients were made for, [steps] or [steps + 1].
        coefficients: [predicted, full]; kept in float64, since a folded table has entries up to +-20 that cancel.
        bias: [predicted]; None: zeros.

    Raises:
        ValueError: for shapes that are not the plan's, numbers that are not finite, or a row that uses a full step
            which has not run yet.
    """

    plan: StepPlan
    times: Tensor
    coefficients: Tensor
    bias: Tensor

    def __init__(
        self, plan: StepPlan, times: Tensor | Sequence[float], coefficients: Tensor, bias: Tensor | None = None
    ) -> None:
        predicted, full = plan.predicted_steps, plan.full_steps
        coefficients = torch.as_tensor(coefficients).detach().to("cpu", torch.float64)
        bias = torch.zeros(len(predicted)) if bias is None else torch.as_tensor(bias)
        bias = bias.detach().to("cpu", torch.float64)
        if (coefficients.shape, bias.shape) != ((len(predicted), len(full)), (len(predicted),)):
            raise ValueError(
                f"coefficients {list(coefficients.shape)} and bias {list(bias.shape)} do not belong to a plan with "
                f"{len(predicted)} predicted and {len(full)} full steps"
            )
        if not (coefficients.isfinite().all() and bias.isfinite().all()):
            raise ValueError("a table must not hold NaN or infinite coefficients")
        too_early = torch.tensor(predicted).unsqueeze(1) < torch.tensor(full)
        if bool((coefficients[too_early] != 0).any()):
            raise ValueError("a predicted step can only use full steps that run before it")
        object.__setattr__(self, "plan", plan)
        object.__setattr__(self, "times", as_times(times, plan.num_steps))
        object.__setattr__(self, "coefficients", coefficients)
        object.__setattr__(self, "bias", bias)

    @property
    def fingerprint(self) -> str:
        """A hash of plan and schedule: equal for equal steps and times (to six digits)."""
        text = repr((self.plan.num_steps, self.plan.full_steps, [f"{t:.6f}" for t in self.times.tolist()]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def table(self, plan: StepPlan, times: Tensor | Sequence[float]) -> "CoefficientTable":
        """This table, or its rest for a plan that starts part-way; so a table can be used as a forecaster.

        Raises:
            ValueError: for another plan or schedule than its own.
        """
        if plan != self.plan and plan != self.plan.starting_at(plan.start):
            raise ValueError(
                f"this table was made for the plan {self.plan}, not for {plan}; make one from its forecaster"
            )
        given = as_times(times, plan.num_steps)
        if not same_times(given, self.times):
            raise ValueError(
                f"this table ({self.fingerprint}) was made for another schedule of {plan.num_steps} steps (another "
                f"time shift, resolution or solver): {difference(self.times, given)}. Sample as it was made for, or "
                "make one for these times from its forecaster"
            )
        return self if plan == self.plan else self._starting_with(plan)

    def _starting_with(self, plan: StepPlan) -> "CoefficientTable":
        """The remaining rows. Coefficients of full steps that do not run are added to the first one that does."""
        row = self.plan.predicted_steps.index
        rows = self.coefficients[[row(step) for step in plan.predicted_steps]]
        coefficients = rows.new_zeros(len(rows), len(plan.full_steps))
        for column, step in zip(rows.unbind(1), self.plan.full_steps, strict=True):
            coefficients[:, plan.full_steps.index(max(step, plan.start))] += column
        return CoefficientTable(plan, self.times, coefficients, self.bias[[row(step) for step in plan.predicted_steps]])

    def limited(self, max_history: int) -> "CoefficientTable":
        """A table in which each step uses only its ``max_history`` latest full features, so that fewer are kept.

        Coefficients of dropped features are added to the oldest that remains, so a constant is still predicted exactly.
        :meth:`GramMatrix.table_error` says what this costs.

        Raises:
            ValueError: for less than one feature.
        """
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1, not {max_history}")
        coefficients = self.coefficients.clone()
        for row, step in zip(coefficients, self.plan.predicted_steps, strict=True):
            oldest = max(0, sum(full < step for full in self.plan.full_steps) - max_history)
            row[oldest] += row[:oldest].sum(0)
            row[:oldest] = 0
        return CoefficientTable(self.plan, self.times, coefficients, self.bias)


class Rows(list[Tensor]):
    """The rows of all steps so far. ``rows[step]`` counts from step 0, also for a plan that starts later."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self._start = start

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int) or key < 0:
            return super().__getitem__(key)
        if key < self._start:
            raise IndexError(f"step {key} does not run, the first is {self._start}")
        return super().__getitem__(key - self._start)


# A rule gives the row of a predicted step from the rows of all steps before it.
Rule = Callable[[int, list[Tensor]], Tensor]


def unroll(plan: StepPlan, times: Tensor | Sequence[float], rule: Rule) -> CoefficientTable:
    """Turn a recursion into a table by running it on unit vectors.

    A rule that is linear in earlier features can run on any vectors. Here full feature j is the unit vector e_j of
    length full + 1, whose last entry is the coefficient of the constant 1. The results are the rows of the table, in
    which earlier predictions are already expressed by full features.
    """
    units = torch.eye(len(plan.full_steps) + 1, dtype=torch.float64)
    rows = Rows(plan.start)
    slots = iter(units)
    for step in range(plan.start, plan.num_steps):
        rows.append(next(slots) if plan.is_full(step) else rule(step, rows))
    if not plan.predicted_steps:
        return CoefficientTable(plan, times, torch.zeros(0, len(plan.full_steps)))
    table = torch.stack([rows[step] for step in plan.predicted_steps])
    return CoefficientTable(plan, times, table[:, :-1], table[:, -1])
