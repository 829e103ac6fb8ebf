"""The plan of a generation: fixed, or a function of its times."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

from lesa.runtime.driver import Call
from lesa.tables.plan import StepPlan

Plan = StepPlan | Callable[[Tensor], StepPlan]

T = TypeVar("T")
MAX_TABLES = 16  # a server has few schedules at a time; folding a LESA predictor takes milliseconds


class Plans:
    """Makes the plan of a generation, once for each schedule.

    Args:
        plan: fixed, or a function of the times [steps + 1] from the first step on.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._made: dict[Hashable, StepPlan] = {}

    def of(self, call: Call) -> StepPlan:
        """The plan of the steps from ``call`` on, counted from step 0 of the schedule.

        Raises:
            ValueError: for a schedule of another length than a fixed plan, or without times for a function.
        """
        if not isinstance(self._plan, StepPlan):
            if call.times is None:
                raise ValueError("a plan that depends on the times needs them: enable(..., times=...)")
            make = functools.partial(_planned, self._plan, call.times, call.step)
            return cached(self._made, (call.step, tuple(call.times.tolist())), make)
        steps = self._plan.num_steps if call.times is None else len(call.times) - 1
        if steps != self._plan.num_steps:
            raise ValueError(
                f"the plan is for {self._plan.num_steps} steps, this generation has {steps} (by the scheduler of the "
                "pipeline that calls the transformer, or else of the one that lesa was enabled on); give a plan for "
                f"{steps} steps, or a function: plan=lambda times: StepPlan.paper(len(times) - 1, interval=7)"
            )
        if call.step >= steps:
            raise ValueError(
                f"the plan is for {steps} steps and this generation goes on; give a plan for as many as it has"
            )
        return self._plan.starting_at(call.step) if call.step > 0 else self._plan


def _planned(plan: Callable[[Tensor], StepPlan], times: Tensor, start: int) -> StepPlan:
    """The plan that a function makes of the times from ``start`` on."""
    rest, steps = plan(times[start:]), len(times) - 1 - start
    if not isinstance(rest, StepPlan) or rest.num_steps != steps:
        raise ValueError(f"the function plan= was asked for a StepPlan of {steps} steps and returned {rest!r}")
    return StepPlan(start + steps, (start + step for step in rest.full_steps), start=start)


def cached(made: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns for a key; the latest few are cached."""
    if key not in made:
        while len(made) >= MAX_TABLES:
            del made[next(iter(made))]
        made[key] = make()
    return made[key]
