"""Step plans: the paper's schedule, checks, and counts of full and predicted steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesa import StepPlan


@pytest.mark.parametrize(
    ("interval", "full", "speedup"),
    [
        (5, (0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47), 3.85),
        (7, (0, 1, 2, 3, 9, 16, 23, 30, 37, 44), 5.00),
        (10, (0, 1, 2, 3, 12, 22, 32, 42), 6.25),
    ],
)
def test_the_paper_plan_of_50_steps_is_the_released_plan(interval, full, speedup):
    plan = StepPlan.paper(50, interval)
    assert plan.full_steps == full
    assert plan.speedup == pytest.approx(speedup, abs=0.005)


def test_the_paper_plan_works_with_very_few_steps():
    assert StepPlan.paper(4, 5).full_steps == (0, 1, 2, 3)
    assert StepPlan.paper(8, 3).full_steps == (0, 1, 2, 3, 5)
    assert StepPlan.paper(2, 5).full_steps == (0, 1)
    assert StepPlan.paper(4, 3, warmup=1).full_steps == (0, 3)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5))
def test_each_step_is_either_full_or_predicted(num_steps, interval, warmup):
    plan = StepPlan.paper(num_steps, interval, warmup)
    assert sorted(plan.full_steps + plan.predicted_steps) == list(range(num_steps))
    assert [plan.is_full(step) for step in range(num_steps)] == [step in plan.full_steps for step in range(num_steps)]
    assert len(str(plan)) == num_steps
    assert str(plan).count("#") == len(plan.full_steps)


def test_full_steps_may_be_given_in_any_order_and_as_any_iterable():
    assert StepPlan(5, (step for step in (3, 0))) == StepPlan(5, [0, 3])
    assert len({StepPlan(5, (3, 0)), StepPlan(5, [0, 3])}) == 1


@pytest.mark.parametrize(
    ("num_steps", "full", "message"),
    [
        (5, [1, 2], "step 0 must be full"),
        (5, [], "step 0 must be full"),
        (5, [0, 5], r"\[5\] lie outside 0 ... 4"),
        (5, [-1, 0], r"\[-1\] lie outside"),
        (5, [0, 2, 2], r"\[2\] are given more than once"),
        (0, [0], "num_steps must be a whole number of at least 1"),
    ],
)
def test_invalid_plans_are_refused(num_steps, full, message):
    with pytest.raises(ValueError, match=message):
        StepPlan(num_steps, full)


def test_invalid_intervals_and_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        StepPlan.paper(50, 0)
    with pytest.raises(ValueError, match="outside"):
        StepPlan.paper(50, 7).is_full(50)
