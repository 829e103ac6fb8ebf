"""Coefficient tables: checks, schedules, limited history, and generations that start part-way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesa import CoefficientTable, Reuse, StepPlan, Taylor
from lesa.tables.times import as_times, same_times
from tests.lesa.strategies import plans, schedule

PLAN = StepPlan(5, [0, 2])  # predicts 1, 3 and 4


def table(coefficients=((1.0, 0.0), (0.5, 0.5), (-1.0, 2.0)), bias=None, times=None):
    """A table for the plan of this module."""
    return CoefficientTable(PLAN, schedule(5) if times is None else times, torch.tensor(coefficients), bias)


def test_tables_are_stored_in_float64():
    assert table().coefficients.dtype == table().bias.dtype == torch.float64
    assert table(bias=torch.ones(3)).bias.tolist() == [1, 1, 1]


def test_a_row_that_uses_a_later_full_step_is_refused():
    with pytest.raises(ValueError, match="before it"):
        table(((1.0, 0.1), (0.5, 0.5), (-1.0, 2.0)))


def test_shapes_that_do_not_match_the_plan_are_refused():
    with pytest.raises(ValueError, match="3 predicted and 2 full"):
        table(((1.0, 0.0),))
    with pytest.raises(ValueError, match="3 predicted"):
        table(bias=torch.zeros(2))


def test_nan_coefficients_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        table(((float("nan"), 0.0), (0.5, 0.5), (-1.0, 2.0)))


def test_a_table_is_a_forecaster_for_its_own_plan_and_schedule_only():
    mine = table()
    assert mine.table(PLAN, schedule(5).float()) is mine  # float32 schedulers differ in the last digit
    with pytest.raises(ValueError, match="another schedule"):
        mine.table(PLAN, schedule(5, shift=0.5))
    with pytest.raises(ValueError, match="made for the plan"):
        mine.table(StepPlan(5, [0, 3]), schedule(5))


def test_fingerprints_differ_between_plans_and_schedules():
    same = table().fingerprint
    assert same == table(times=schedule(5)[:-1]).fingerprint
    assert same != table(times=schedule(5, shift=0.5)).fingerprint
    assert same != Reuse().table(StepPlan(5, [0, 3]), schedule(5)).fingerprint


@given(plans())
def test_reuse_predicts_the_last_full_feature(plan):
    made = Reuse().table(plan, schedule(plan.num_steps))
    for row, step in zip(made.coefficients, plan.predicted_steps, strict=True):
        last = max(full for full in plan.full_steps if full < step)
        assert row.tolist() == [float(full == last) for full in plan.full_steps]


@given(plans())
def test_taylor_of_order_0_is_reuse(plan):
    times = schedule(plan.num_steps)
    assert torch.equal(Taylor(0).table(plan, times).coefficients, Reuse().table(plan, times).coefficients)


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.7], [1.0, float("nan"), 0.0], [1.0, 0.5], [[1.0, 0.5, 0.2]]])
def test_times_that_are_not_a_schedule_of_3_steps_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        as_times(times, 3)


def test_the_final_time_may_be_left_out():
    assert as_times([1.0, 0.5], 2).tolist() == [1.0, 0.5, 0.0]
    assert not same_times(as_times([1.0, 0.5], 2), as_times([1.0, 0.6], 2))


@given(plans(), st.integers(1, 5))
def test_a_limited_table_uses_the_latest_features_and_predicts_constants(plan, limit):
    rows = torch.randn(len(plan.predicted_steps), len(plan.full_steps), dtype=torch.float64)
    causal = torch.tensor(plan.predicted_steps).unsqueeze(1) > torch.tensor(plan.full_steps)
    whole = CoefficientTable(plan, schedule(plan.num_steps), rows * causal)
    limited = whole.limited(limit)
    torch.testing.assert_close(limited.coefficients.sum(1), whole.coefficients.sum(1))
    for row, step in zip(limited.coefficients, plan.predicted_steps, strict=True):
        latest = [j for j, full in enumerate(plan.full_steps) if full < step][-limit:]
        assert set(row.nonzero().flatten().tolist()) <= set(latest)
    if len(plan.full_steps) <= limit:
        assert torch.equal(limited.coefficients, whole.coefficients)


def test_a_limit_of_zero_features_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        table().limited(0)


@given(plans(max_steps=12), st.integers(0, 11), st.sampled_from([Reuse(), Taylor(1), Taylor(2)]))
def test_a_table_from_a_later_start_equals_that_of_the_remaining_schedule(plan, start, forecaster):
    start %= plan.num_steps
    rest, times = plan.starting_at(start), schedule(plan.num_steps)
    made = forecaster.table(rest, times)
    alone = StepPlan(plan.num_steps - start, [step - start for step in rest.full_steps])
    torch.testing.assert_close(made.coefficients, forecaster.table(alone, times[start:]).coefficients)
    # a fixed table still predicts a constant feature as before
    whole = forecaster.table(plan, times)
    left = whole.table(rest, times)
    kept = [plan.predicted_steps.index(step) for step in rest.predicted_steps]
    torch.testing.assert_close(left.coefficients.sum(1), whole.coefficients[kept].sum(1))
