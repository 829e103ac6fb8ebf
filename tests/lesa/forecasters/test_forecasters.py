"""Forecasters: each is compared with its published formula, written a second time here."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from numpy.polynomial.hermite import hermval

from lesa import (
    L2P,
    FoCa,
    GramMatrix,
    Hermite,
    LeastSquares,
    Reuse,
    StepPlan,
    Taylor,
    make_forecaster,
    register_forecaster,
)
from tests.lesa.strategies import plans, schedule


def predict(forecaster, plan, features, times=None):
    """The predictions [predicted, ...] of a forecaster's table, given the features [steps, ...] of all steps."""
    made = forecaster.table(plan, schedule(plan.num_steps) if times is None else times)
    full = features[list(plan.full_steps)].flatten(1)
    return (made.coefficients @ full + made.bias[:, None]).reshape(-1, *features.shape[1:])


def expansion(features, plan, order, basis):
    """``sum_i factor_i basis(i, x)`` with TaylorSeer's factors as its paper writes them, on the features themselves."""
    factors, last, result = [], None, []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            new = [features[step]]
            for i in range(min(order, len(factors))):
                new.append((new[i] - factors[i]) / (step - last))
            factors, last = new, step
        else:
            result.append(sum(factor * basis(i, step - last) for i, factor in enumerate(factors)))
    return torch.stack(result)


def before(plan, step):
    """The full steps before ``step``, latest first."""
    return [full for full in reversed(plan.full_steps) if full < step]


def random_features(plan):
    """Random features [steps, 3] for a plan that predicts at least one step."""
    assume(plan.predicted_steps)
    return torch.randn(plan.num_steps, 3, dtype=torch.float64)


@given(plans(), st.integers(0, 4))
def test_taylor_equals_the_taylorseer_formula(plan, order):
    features = random_features(plan)
    expected = expansion(features, plan, order, lambda i, x: x**i / math.factorial(i))
    torch.testing.assert_close(predict(Taylor(order), plan, features), expected)


@given(plans(), st.integers(0, 4), st.floats(0.1, 1))
def test_hermite_equals_the_hicache_formula(plan, order, scale):
    def basis(i, x):
        return scale**i * hermval(scale * x, [0] * i + [1]) / math.factorial(i)

    features = random_features(plan)
    expected = expansion(features, plan, order, basis)
    torch.testing.assert_close(predict(Hermite(order, scale), plan, features), expected)


@given(st.integers(1, 6), st.integers(3, 5))
def test_foca_equals_the_published_formula_on_even_intervals(interval, num_full):
    plan = StepPlan(num_full * interval + 3, range(0, num_full * interval, interval))
    features = torch.randn(plan.num_steps, 3, dtype=torch.float64)
    made = dict(zip(plan.predicted_steps, predict(FoCa(), plan, features), strict=True))
    for step in plan.predicted_steps:
        if len(full := before(plan, step)) < 4:
            continue
        f, h = [features[k] for k in full], step - full[0]
        slope = (3 * f[0] - 4 * f[1] + f[2]) / (2 * interval)
        slope_before = (3 * f[1] - 4 * f[2] + f[3]) / (2 * interval)
        forecast = 4 / 3 * f[0] - 1 / 3 * f[1] + 2 / 3 * h * slope
        slope_forecast = (3 * forecast - 4 * f[0] + f[1]) / (2 * h)
        torch.testing.assert_close(made[step], f[0] + h / 2 * (slope_before + slope_forecast))


@given(plans())
def test_foca_takes_its_slopes_from_parabolas_on_uneven_intervals(plan):
    features = random_features(plan)

    def slope(full, channel):
        parabola = Polynomial.fit(full[:3], features[full[:3], channel], min(2, len(full) - 1))
        return parabola.deriv()(full[0])

    for prediction, step in zip(predict(FoCa(), plan, features), plan.predicted_steps, strict=True):
        full = before(plan, step)
        for channel in range(3):
            expected = float(features[full[0], channel])
            if len(full) > 1:
                slopes = slope(full, channel) + slope(full[1:] if len(full) > 2 else full, channel)
                expected += (step - full[0]) / 2 * slopes
            assert float(prediction[channel]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(plans(), st.booleans())
def test_l2p_applies_its_matrix_to_features_and_earlier_predictions(plan, as_published):
    features = random_features(plan)
    weights = torch.randn(plan.num_steps, plan.num_steps, dtype=torch.float64) / plan.num_steps
    known = [f.clone() for f in features]
    for step in plan.predicted_steps:
        known[step] = sum(float(weights[step, j]) * known[j] for j in range(step))
    made = predict(L2P(weights[1:, :-1] if as_published else weights), plan, features)
    torch.testing.assert_close(made, torch.stack(known)[list(plan.predicted_steps)])


LINES = [
    Taylor(1),
    Taylor(3),
    Taylor(1, "time"),
    Taylor(3, "time"),
    Hermite(1, math.sqrt(0.5)),
    Hermite(3, math.sqrt(0.5)),
    FoCa(),
]


@pytest.mark.parametrize("forecaster", LINES, ids=repr)
@given(plan=plans())
def test_features_on_a_straight_line_are_predicted_exactly(forecaster, plan):
    times = schedule(plan.num_steps)
    x = times[:-1] if forecaster.needs_times else torch.arange(plan.num_steps, dtype=torch.float64)
    features = torch.stack([3 * x - 1, -x], 1)
    made = predict(forecaster, plan, features, times)
    for prediction, step in zip(made, plan.predicted_steps, strict=True):
        if len(before(plan, step)) >= 2:
            torch.testing.assert_close(prediction, features[step])


@given(plans(), st.integers(1, 4), st.floats(0.1, 1))
def test_hermite_continues_a_straight_line_with_its_slope_contracted(plan, order, scale):
    features = torch.arange(plan.num_steps, dtype=torch.float64)[:, None]
    made = predict(Hermite(order, scale), plan, features)
    for prediction, step in zip(made, plan.predicted_steps, strict=True):
        if len(full := before(plan, step)) >= 2:
            assert float(prediction) == pytest.approx(full[0] + 2 * scale**2 * (step - full[0]))


def test_l2p_with_a_linear_matrix_continues_a_straight_line():
    weights = 2 * torch.eye(9).roll(1, 0) - torch.eye(9).roll(2, 0)  # F(s) = 2 F(s - 1) - F(s - 2)
    line = torch.arange(9, dtype=torch.float64)[:, None]
    plan = StepPlan(9, [0, 1, 5])
    torch.testing.assert_close(predict(L2P(weights), plan, line), line[list(plan.predicted_steps)])


@pytest.mark.parametrize("forecaster", [*LINES, Reuse(), Hermite(2)], ids=repr)
@given(plan=plans())
def test_a_constant_feature_is_predicted_exactly(forecaster, plan):
    assume(plan.predicted_steps)
    made = predict(forecaster, plan, torch.full((plan.num_steps, 1), 7.0, dtype=torch.float64))
    # the second Hermite polynomial is not zero at zero, but its factor is
    torch.testing.assert_close(made, torch.full_like(made, 7.0))


def test_taylor_by_time_is_finite_if_two_steps_have_the_same_time():
    times = torch.tensor([1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.0])
    made = Taylor(2, "time").table(StepPlan(6, [0, 1, 2]), times)
    assert bool(made.coefficients.isfinite().all())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Taylor(-1), "order"),
        (lambda: Taylor(1, "sigma"), "variable"),
        (lambda: Hermite(-1), "order"),
        (lambda: Hermite(2, scale=0), r"scale must be a number above 0"),
        (lambda: L2P(torch.zeros(3, 4)), "square matrix"),
        (lambda: L2P(torch.full((3, 3), math.nan)), "NaN"),
    ],
)
def test_invalid_parameters_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("forecaster", [*LINES, Reuse(), Hermite(2)], ids=repr)
@given(plan=plans())
def test_no_prediction_uses_more_features_than_the_reach_of_its_forecaster(forecaster, plan):
    table = forecaster.table(plan, schedule(plan.num_steps))
    for row, step in zip(table.coefficients, plan.predicted_steps, strict=True):
        assert not row[: max(0, len(before(plan, step)) - forecaster.reach)].any()


PART_WAY = [*LINES, Reuse(), Hermite(2), L2P(torch.randn(12, 12, dtype=torch.float64))]


@pytest.mark.parametrize("forecaster", PART_WAY, ids=lambda f: type(f).__name__)
@given(plan=plans(max_steps=12), start=st.integers(0, 11))
def test_a_generation_that_starts_part_way_has_a_table(forecaster, plan, start):
    plan = StepPlan(12, plan.full_steps).starting_at(start)
    made = forecaster.table(plan, schedule(12))
    if not isinstance(forecaster, L2P):
        torch.testing.assert_close(made.coefficients.sum(1), torch.ones(len(made.coefficients), dtype=torch.float64))


def test_l2p_refuses_another_number_of_steps():
    with pytest.raises(ValueError, match="49 or 50 steps, the plan has 28"):
        L2P(torch.zeros(49, 49)).table(StepPlan(28, [0]), schedule(28))


def gram_of(features):
    """The Gram matrix of features [samples, steps, n]."""
    gram = GramMatrix(features.shape[1])
    for step in range(features.shape[1]):
        gram.update(step, features[:, step])
    return gram


def test_least_squares_equals_torch_lstsq():
    features = torch.randn(40, 6, 5, dtype=torch.float64).cumsum(1) + 0.5
    plan = StepPlan(6, [0, 2, 3])
    made = LeastSquares(gram_of(features), ridge=0).table(plan, schedule(6))
    for row, bias, step in zip(made.coefficients, made.bias, plan.predicted_steps, strict=True):
        used = [full for full in plan.full_steps if full < step]
        design = torch.stack([features[:, u].flatten() for u in used] + [torch.ones(200, dtype=torch.float64)], 1)
        expected = torch.linalg.lstsq(design, features[:, step].flatten()).solution
        torch.testing.assert_close(torch.cat([row[: len(used)], bias[None]]), expected)


def test_least_squares_has_the_lowest_error_on_the_calibration_features():
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


def test_forecasters_are_made_by_name_and_new_ones_can_be_registered():
    assert make_forecaster("taylor", order=1) == Taylor(1)
    register_forecaster("last of all", Reuse)
    assert make_forecaster("last of all") == Reuse()
    with pytest.raises(ValueError, match="registered already"):
        register_forecaster("reuse", Reuse)
    with pytest.raises(ValueError, match=r"known are .*taylor"):
        make_forecaster("tailor")
