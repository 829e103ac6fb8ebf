"""The loss of an interval, computed in one batch and step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesa import LesaConfig, StepPlan
from lesa.training.interval import interval_error, intervals
from tests.lesa.predictors import kan_predictor, random_predictor
from tests.lesa.strategies import plans, schedule


def step_by_step(predictor, times, interval, true, window, *, closed):
    """The loss of the paper's loop; ``closed``: each prediction is written into the window, without its gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for step in interval:
        prediction = predictor(window[:step], times, times[step])
        total = total + (prediction - true[step]).abs().sum()
        if closed:
            window[step] = prediction.detach()
    return total


def compare(predictor, plan, closed, seed):
    """Assert that both losses of each interval, their gradients and the windows agree."""
    times = schedule(plan.num_steps)
    true = torch.randn(plan.num_steps, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    window, listed = true.clone(), list(true.clone())
    for interval in intervals(plan):
        results = []
        for error_of, features in ((interval_error, window), (step_by_step, listed)):
            predictor.zero_grad()
            error = error_of(predictor, times, interval, true, features, closed=closed)
            error.backward()
            results.append([error.detach(), *(p.grad.clone() for p in predictor.parameters() if p.grad is not None)])
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(window, torch.stack(listed))
    if not closed:
        assert torch.equal(window, true)


@given(
    plans(max_steps=14),
    st.integers(1, 9),
    st.lists(st.floats(0.05, 0.95), max_size=2, unique=True),
    st.booleans(),
    st.integers(0, 99),
)
def test_one_batch_per_interval_gives_the_loss_and_gradients_of_single_steps(plan, history, bounds, closed, seed):
    bounds = tuple(sorted(bounds, reverse=True))
    config = LesaConfig(plan.num_steps, hidden_dim=2, history=history, boundaries=bounds)
    compare(random_predictor(config, seed), plan, closed, seed)


@pytest.mark.parametrize("closed", [False, True])
def test_a_kan_on_the_features_gives_the_step_by_step_loss_and_gradients(closed):
    compare(kan_predictor(), StepPlan(10, [0, 1, 4]), closed, 0)


def test_intervals_are_the_ranges_of_consecutive_predicted_steps():
    assert list(intervals(StepPlan(9, [0, 1, 4, 8]))) == [range(2, 4), range(5, 8)]
    assert list(intervals(StepPlan(3, [0]))) == [range(1, 3)]
    assert list(intervals(StepPlan(2, [0, 1]))) == []


@pytest.mark.parametrize("closed", [False, True])
def test_bf16_features_give_the_loss_in_float32(closed):
    plan, times = StepPlan(10, [0, 1, 4]), schedule(10)
    predictor = random_predictor(LesaConfig(10, hidden_dim=4)).float()
    with torch.no_grad():
        for layer in predictor.latent:
            layer.weight.mul_(0.1)
    true = torch.randn(10, 2, 64, 16).bfloat16()
    window, exact = true.clone(), true.float()
    for interval in intervals(plan):
        error = interval_error(predictor, times, interval, true, window, closed=closed)
        wide = interval_error(predictor, times, interval, true.float(), exact, closed=closed)
        assert error.dtype == torch.float32
        torch.testing.assert_close(error, wide, rtol=2e-3, atol=0)
    assert window.dtype == torch.bfloat16
