"""The search of plans: the full steps with the smallest predicted error, for each budget.

1. Dynamic programming. If predictions use the last three full features only and errors do not cancel, the cost of an
   interval depends on the full steps around it alone. So the best plans of all sizes are found at once.
2. Descent. Single full steps are moved by 1, 2 or 4 while that lowers the real cost, in which errors cancel along the
   path (:mod:`lesa.forecasters.path_least_squares`). It has several starts, since it ends in local minima: those of
   step 1 for two powers of the error, evenly spaced steps, and the best smaller plan with one step inserted.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.arguments import whole
from lesa.forecasters.path_least_squares import RIDGE, PathLeastSquares
from lesa.statistics.output_errors import OutputErrorGram, path_weights
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times

LAST = 3  # full steps in a state of the dynamic program; each more multiplies its cost by the number of steps
MOVES = (1, -1, 2, -2, 4, -4)

Cost = Callable[[StepPlan], float]


def search_plans(
    errors: OutputErrorGram,
    times: Tensor | Sequence[float],
    budgets: Sequence[int],
    *,
    forecaster: Forecaster | None = None,
    progress: bool = True,
) -> dict[int, StepPlan]:
    """The best plan for each number of full steps.

    Args:
        errors: of a calibration.
        times: the schedule, [steps] or [steps + 1].
        budgets: numbers of full steps.
        forecaster: the plan is for this one; None: for :class:`PathLeastSquares` on these errors.
        progress: show a progress bar.

    Raises:
        ValueError: for a budget that is not 1 ... steps, or if nothing has been counted.
    """
    times = as_times(times, errors.num_steps)
    for budget in budgets:
        whole("a number of full steps", budget, least=1, most=errors.num_steps)
    if not budgets:
        return {}
    starts = _starts(errors, times, max(budgets))
    cost = plan_cost(errors, times, forecaster)
    plans: dict[int, StepPlan] = {}
    # every smaller plan first, so that a plan does not depend on which others are asked for
    for budget in tqdm(range(1, max(budgets) + 1), desc="searching plans", disable=not progress, delay=2):
        candidates = starts[budget]
        if budget > 1:
            candidates.append(_insert(plans[budget - 1], cost))
        plans[budget] = min((_descend(plan, cost) for plan in dict.fromkeys(candidates)), key=cost)
    return {budget: plans[budget] for budget in sorted(budgets)}


def candidate_plans(errors: OutputErrorGram, times: Tensor, plan: StepPlan, count: int) -> list[StepPlan]:
    """A plan and the best others: ends of the other descents, and plans one move away, by the cost of the search.

    The cost ignores that full steps run on a slightly different path, so the cheapest plan may not give the best
    samples; :func:`lesa.refine_plans` tries several.
    """
    cost = plan_cost(errors, times)
    ends = [_descend(start, cost) for start in _starts(errors, times, len(plan.full_steps))[len(plan.full_steps)]]
    rivals = dict.fromkeys([*ends, *_moved(plan)])
    rivals.pop(plan, None)
    return [plan, *sorted(rivals, key=cost)[: count - 1]]


def plan_cost(errors: OutputErrorGram, times: Tensor, forecaster: Forecaster | None = None) -> Cost:
    """The function of a plan that the search minimises."""
    if forecaster is None:
        best = PathLeastSquares(errors)
        return lambda plan: best.cost(plan, times)

    def cost(plan: StepPlan) -> float:
        weights = path_weights(plan, times, weight=1.0)
        return float((errors.errors(forecaster.table(plan, times)) * weights).sum())

    return cost


def sample_error(errors: OutputErrorGram, plan: StepPlan, times: Tensor, forecaster: Forecaster | None = None) -> float:
    """The predicted root mean square distance of the final sample from the full sampler's, in units of the latents.

    To first order: the sum of the errors of all predicted steps, without the effect of later full steps on it. Pure
    noise has root mean square 1.
    """
    times = as_times(times, plan.num_steps)
    length = times[:-1] - times[1:]
    table = (forecaster or PathLeastSquares(errors)).table(plan, times)
    return float((length @ errors.errors(table) @ length).clamp(min=0).sqrt())


def _starts(errors: OutputErrorGram, times: Tensor, most: int) -> dict[int, list[StepPlan]]:
    """The plans that descents start from, for each number of full steps."""
    programmed = [_dynamic_programming(errors, times, most, power) for power in (1, 2)]
    return {n: [*(plans[n] for plans in programmed), StepPlan.even(times, n)] for n in range(1, most + 1)}


def _moved(plan: StepPlan) -> Iterator[StepPlan]:
    """All plans with one full step moved."""
    for index in range(1, len(plan.full_steps)):
        yield from _moved_at(plan, index)


def _moved_at(plan: StepPlan, index: int) -> Iterator[StepPlan]:
    for move in MOVES:
        full = list(plan.full_steps)
        full[index] += move
        if full[index] not in plan.full_steps and 0 < full[index] < plan.num_steps:
            yield StepPlan(plan.num_steps, full)


def _descend(plan: StepPlan, cost: Cost) -> StepPlan:
    """Move one full step at a time while that helps."""
    best, improved = cost(plan), True
    while improved:
        improved = False
        for index in range(1, len(plan.full_steps)):
            for candidate in _moved_at(plan, index):
                value = cost(candidate)
                if value < best * (1 - 1e-6):
                    plan, best, improved = candidate, value, True
    return plan


def _insert(plan: StepPlan, cost: Cost) -> StepPlan:
    """The plan with one more full step, where it lowers the cost most."""
    return min((StepPlan(plan.num_steps, [*plan.full_steps, step]) for step in plan.predicted_steps), key=cost)


def _dynamic_programming(errors: OutputErrorGram, times: Tensor, most: int, power: int) -> dict[int, StepPlan]:
    """For each number of full steps the plan that minimises ``sum_s d_s |e_s|**power``, with three features each.

    State [a, b, c]: the last three full steps plus 1 each; 0 if there are fewer.
    """
    steps = errors.num_steps
    intervals = _interval_costs(errors, times[:-1] - times[1:], power)  # [a, b, c, d]
    value = torch.full((steps + 1,) * LAST, torch.inf, dtype=torch.float64)
    value[0, 0, 1] = 0  # step 0 is full
    choices: list[Tensor] = []
    plans = {}
    for budget in range(1, most + 1):
        state = int((value + intervals[..., -1]).argmin())
        plans[budget] = StepPlan(steps, _backtrack(state, choices, steps + 1))
        value, choice = (value[..., None] + intervals[..., :-1]).min(0)
        choices.append(choice)
    return plans


def _backtrack(state: int, choices: list[Tensor], size: int) -> list[int]:
    a, b, c = state // size**2, state // size % size, state % size
    full = []
    for choice in reversed(choices):
        full.append(c - 1)
        a, b, c = int(choice[a, b, c]), a, b
    return [*full, c - 1]


def _interval_costs(errors: OutputErrorGram, length: Tensor, power: int) -> Tensor:
    """``sum d_s |e_s|**power`` over the steps between full steps c and d, [a, b, c, d] (each plus 1).

    The last d is the end. Infinite unless a < b < c < d.
    """
    steps = errors.num_steps
    size = steps + 1
    result = torch.full((size, size, size, size + 1), torch.inf, dtype=torch.float64)
    triples = torch.cartesian_prod(*[torch.arange(size)] * LAST)
    a, b, c = triples.T
    triples = triples[((a < b) | (b == 0)) & (b < c) & ((a == 0) | (b > 0))]
    for last in range(1, size):
        used = triples[triples[:, -1] == last]
        cost = torch.zeros(len(used), size + 1, dtype=torch.float64)
        for step in range(last, steps):
            cost[:, step + 2] = cost[:, step + 1] + length[step] * _step_errors(errors, step, used) ** power
        cost[:, : last + 1] = torch.inf
        result[used[:, 0], used[:, 1], last] = cost
    return result


def _step_errors(errors: OutputErrorGram, step: int, states: Tensor) -> Tensor:
    """``|e_s|`` [n] of the best prediction of a step from each of n states [n, 3]."""
    used = (states - 1).clamp(min=0)
    missing = (states == 0).double()
    target = torch.full_like(used, step)
    system = errors.products(target, used) if step else torch.zeros(*used.shape, used.shape[-1], dtype=torch.float64)
    present = 1 - missing
    power = errors.power[step].clamp(min=1e-30)  # an output may be zero
    system = system * present[:, :, None] * present[:, None] + torch.diag_embed(missing + RIDGE * power)
    lengths = errors.length(target, used) * present
    towards = torch.linalg.solve(system, lengths)
    sizes: Tensor = (lengths * towards).sum(-1).clamp(min=1e-300).rsqrt()
    return sizes
