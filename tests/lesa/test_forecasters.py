import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lesa import GramMatrix, LeastSquares, Reuse, StepPlan, Taylor, make_forecaster, register_forecaster
from tests.lesa.strategies import plans, schedule


def predict(forecaster, plan, features, times=None):
    """The predictions [predicted, ...] that a forecaster's table makes of the features [steps, ...] of all steps."""
    made = forecaster.table(plan, schedule(plan.num_steps) if times is None else times)
    full = features[list(plan.full_steps)].flatten(1)
    return (made.coefficients @ full + made.bias[:, None]).reshape(-1, *features.shape[1:])


def taylorseer(features, plan, order):
    """TaylorSeer as its paper writes it, on the features themselves."""
    factors, last, result = [], None, []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            new = [features[step]]
            for i in range(min(order, len(factors))):
                new.append((new[i] - factors[i]) / (step - last))
            factors, last = new, step
        else:
            x, factorial, total = step - last, 1, torch.zeros_like(features[0])
            for i, factor in enumerate(factors):
                factorial *= max(i, 1)
                total = total + factor * x**i / factorial
            result.append(total)
    return torch.stack(result)


@given(plans(), st.integers(0, 4))
def test_taylor_is_taylorseer_on_the_features(plan, order):
    assume(plan.predicted_steps)
    features = torch.randn(plan.num_steps, 3, dtype=torch.float64)
    torch.testing.assert_close(predict(Taylor(order), plan, features), taylorseer(features, plan, order))


@given(plans(), st.integers(1, 3), st.sampled_from(["step", "time"]))
def test_taylor_continues_a_straight_line_in_its_variable_exactly(plan, order, variable):
    times = schedule(plan.num_steps)
    x = times[:-1] if variable == "time" else torch.arange(plan.num_steps, dtype=torch.float64)
    features = torch.stack([3 * x - 1, -x], 1)
    made = predict(Taylor(order, variable), plan, features, times)
    for prediction, step in zip(made, plan.predicted_steps, strict=True):
        if sum(full < step for full in plan.full_steps) >= 2:
            torch.testing.assert_close(prediction, features[step])


def test_taylor_by_time_survives_two_steps_at_one_time():
    times = torch.tensor([1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.0])
    made = Taylor(2, "time").table(StepPlan(6, [0, 1, 2]), times)
    assert bool(made.coefficients.isfinite().all())


def test_taylor_refuses_orders_and_variables_that_do_not_exist():
    with pytest.raises(ValueError, match="order"):
        Taylor(-1)
    with pytest.raises(ValueError, match="variable"):
        Taylor(1, "sigma")


def gram_of(features):
    """Of features [samples, steps, n]."""
    gram = GramMatrix(features.shape[1])
    for step in range(features.shape[1]):
        gram.update(step, features[:, step])
    return gram


def test_least_squares_is_what_lstsq_finds():
    features = torch.randn(40, 6, 5, dtype=torch.float64).cumsum(1) + 0.5
    plan = StepPlan(6, [0, 2, 3])
    made = LeastSquares(gram_of(features), ridge=0).table(plan, schedule(6))
    for row, bias, step in zip(made.coefficients, made.bias, plan.predicted_steps, strict=True):
        used = [full for full in plan.full_steps if full < step]
        design = torch.stack([features[:, u].flatten() for u in used] + [torch.ones(200, dtype=torch.float64)], 1)
        expected = torch.linalg.lstsq(design, features[:, step].flatten()).solution
        torch.testing.assert_close(torch.cat([row[: len(used)], bias[None]]), expected)


def test_no_forecaster_is_closer_to_the_calibration_features_than_least_squares():
    features = torch.randn(40, 10, 5, dtype=torch.float64).cumsum(1).cumsum(1)
    plan = StepPlan(10, [0, 1, 4, 7])
    steps = features.transpose(0, 1)
    true = steps[list(plan.predicted_steps)]
    error = {f: (predict(f, plan, steps) - true).square().mean() for f in (Reuse(), Taylor(1), Taylor(2))}
    best = (predict(LeastSquares(gram_of(features)), plan, steps) - true).square().mean()
    assert all(best < other for other in error.values())


def test_least_squares_without_bias_has_none():
    gram = gram_of(torch.randn(4, 5, 3) + 1)
    assert LeastSquares(gram, bias=False).table(StepPlan(5, [0]), schedule(5)).bias.tolist() == [0] * 4
    assert LeastSquares(gram).table(StepPlan(5, [0]), schedule(5)).bias.abs().min() > 0


def test_forecasters_are_made_by_name_and_others_can_be_added():
    assert make_forecaster("taylor", order=1) == Taylor(1)
    register_forecaster("last of all", Reuse)
    assert make_forecaster("last of all") == Reuse()
    with pytest.raises(ValueError, match="registered already"):
        register_forecaster("reuse", Reuse)
    with pytest.raises(ValueError, match=r"known are .*taylor"):
        make_forecaster("tailor")
