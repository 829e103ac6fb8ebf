"""Calibration: errors at the model's output, the plans and coefficients that follow, and the calibration file."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import lesa
from lesa.calibration.calibration import Calibration, Measured
from lesa.calibration.planning import candidate_plans, plan_cost, search_plans
from lesa.statistics.output_errors import LinearHead, OutputErrorGram, measure_output_errors, path_weights
from lesa.statistics.resampling import resample
from lesa.training.from_gram import PathLoss, fit_gram
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.calibrations import products

STEPS = 10
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def features(seed: int = 0, steps: int = STEPS) -> torch.Tensor:
    """Smooth random features [steps, 2, 6, 12] around a large constant."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(5, 2, 6, 12, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    curves = torch.stack([t**0, t, t**2, torch.sin(5 * t), torch.cos(9 * t)], 1) * torch.tensor(
        [1.0, 0.5, 0.4, 0.2, 0.1]
    )
    noise = 0.02 * torch.randn(steps, 2, 6, 12, generator=generator, dtype=torch.float64)
    return torch.einsum("sk,kbtd->sbtd", curves, waves) + noise


def heads(steps: int = STEPS) -> list[LinearHead]:
    """Random output heads of all steps."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    return [
        LinearHead(1 + 0.2 * torch.randn(2, 12, generator=generator, dtype=torch.float64), weight, 1e-6)
        for _ in range(steps)
    ]


def measured_errors(seed: int = 0) -> OutputErrorGram:
    """The output errors of smooth random features."""
    return measure_output_errors(list(features(seed)), heads())


def output(feature: torch.Tensor, head: LinearHead) -> torch.Tensor:
    """The output of a head for a feature."""
    normal = F.layer_norm(feature, feature.shape[-1:], eps=head.eps)
    return (normal * head.multiplier[:, None]) @ head.weight.T


@pytest.mark.parametrize("step", [3, 7, 9])
def test_the_output_error_equals_the_derivative_of_the_output(step):
    path, head, gram = features(), heads()[step], measured_errors()
    used = torch.tensor([0, 2])
    direction = torch.tensor([0.7, -0.4], dtype=torch.float64)
    squared = direction @ gram.products(torch.full((2,), step), used) @ direction
    tiny = 1e-5
    moved = path[step] + tiny * torch.einsum("j,jbtd->btd", direction, path[used])
    found = (output(moved, head) - output(path[step], head)) / tiny
    assert found.square().mean().item() == pytest.approx(squared.item(), rel=1e-3)


def test_merged_errors_equal_the_errors_of_both_samples():
    one, two = measured_errors(0), measured_errors(1)
    twice = [head._replace(multiplier=head.multiplier.repeat(2, 1)) for head in heads()]
    both = measure_output_errors(list(torch.cat([features(0), features(1)], dim=1)), twice)
    one.merge(two)
    torch.testing.assert_close(products(one), products(both))
    assert one.count == both.count


def test_path_least_squares_has_the_lowest_cost_of_all_nearby_tables():
    gram, plan = measured_errors(), lesa.StepPlan(STEPS, [0, 2, 5, 8])
    forecaster = lesa.PathLeastSquares(gram, ridge=1e-12)
    table, weights = forecaster.table(plan, TIMES), path_weights(plan, TIMES, 1.0)
    cost = (gram.errors(table) * weights).sum().item()
    assert forecaster.cost(plan, TIMES) == pytest.approx(cost, rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = 0.01 * torch.randn(table.coefficients.shape, generator=generator, dtype=torch.float64)
        other = lesa.CoefficientTable(plan, TIMES, table.coefficients + noise * (table.coefficients != 0))
        assert (gram.errors(other) * weights).sum().item() >= cost * (1 - 1e-6)


def test_history_limits_the_number_of_features_in_a_prediction():
    plan = lesa.StepPlan(STEPS, [0, 2, 4, 6])
    table = lesa.PathLeastSquares(measured_errors(), history=2).table(plan, TIMES)
    assert int((table.coefficients != 0).sum(1).max()) == 2


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_the_search_finds_a_plan_close_to_the_best_of_all_plans(budget):
    gram = measured_errors()
    cost = plan_cost(gram, TIMES)
    found = search_plans(gram, TIMES, [budget], progress=False)[budget]
    every = (lesa.StepPlan(STEPS, [0, *rest]) for rest in itertools.combinations(range(1, STEPS), budget - 1))
    assert cost(found) <= 1.3 * min(map(cost, every))


def test_the_searched_plan_costs_less_than_the_papers_for_its_forecaster():
    gram, paper = measured_errors(), lesa.StepPlan.paper(STEPS, 7)
    count = len(paper.full_steps)
    assert plan_cost(gram, TIMES)(lesa.optimize_plan(gram, count, times=TIMES)) < plan_cost(gram, TIMES)(paper)
    cost = plan_cost(gram, TIMES, lesa.Taylor(1))
    assert cost(lesa.optimize_plan(gram, count, times=TIMES, forecaster=lesa.Taylor(1))) < cost(paper)


def test_budgets_out_of_range_are_refused():
    gram = measured_errors()
    with pytest.raises(ValueError, match="1 to 10"):
        lesa.optimize_plan(gram, 11)


def test_lesa_fitted_to_inner_products_costs_less_than_a_fifth_of_reuse():
    gram, plan = measured_errors(), lesa.StepPlan(STEPS, [0, 2, 5, 8])
    config = lesa.LesaConfig(STEPS, hidden_dim=8)
    fitted = fit_gram(gram, plan, TIMES, config, rounds=(15, 2), progress=False)
    weights = path_weights(plan, TIMES, 1.0)

    def cost(forecaster: lesa.Forecaster) -> float:
        return float((gram.errors(forecaster.table(plan, TIMES)) * weights).sum())

    assert cost(fitted) < 0.2 * cost(lesa.Reuse())
    assert fitted.plan == plan


def test_the_gradient_of_the_path_loss_equals_finite_differences():
    plan, config = lesa.StepPlan(STEPS, [0, 2, 5, 8]), lesa.LesaConfig(STEPS, hidden_dim=8)
    loss = PathLoss(measured_errors(), plan, TIMES, config)
    torch.manual_seed(0)
    weights = [0.1 * torch.randn(1, k, dtype=torch.float64) for k in config.windows]
    gates = torch.randn(len(plan.predicted_steps), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: loss(weights, g), gates)


def calibration(seed: int = 0, request: str = "a") -> Calibration:
    """A calibration of one call with two samples."""
    gram = lesa.GramMatrix(STEPS)
    for step, feature in enumerate(features(seed)):
        gram.update(step, feature)
    streams = {("transformer", "cond"): Measured(gram, measured_errors(seed))}
    return Calibration(TIMES, streams, {"transformer": "A 1"}, requests=[request], samples=2)


def test_a_saved_calibration_is_loaded_unchanged(tmp_path):
    made = calibration()
    made.search(progress=False)
    made.save(tmp_path)
    read = Calibration.load(tmp_path)
    assert read.plans == made.plans
    assert read.plan(speedup=2.5) == made.plan(4)
    torch.testing.assert_close(products(read.errors()), products(made.errors()))
    assert isinstance(lesa.load(tmp_path), Calibration)
    (tmp_path / "calibration.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a complete calibration"):
        Calibration.load(tmp_path)


def test_a_file_with_a_damaged_gram_matrix_is_refused(tmp_path):
    made = calibration()
    made.streams["transformer", "cond"].gram.matrix[2, 3] = float("nan")
    made.save(tmp_path)
    with pytest.raises(ValueError, match=r"calibration\.safetensors is not a complete .*transformer\.cond.*NaN"):
        Calibration.load(tmp_path)


def test_the_same_call_is_not_merged_twice():
    made = calibration()
    with pytest.raises(ValueError, match="same call"):
        made.merge(calibration())
    made.merge(calibration(1, "b"))
    assert made.samples == 4


def test_only_one_budget_is_accepted_and_it_may_be_an_error():
    made = calibration()
    with pytest.raises(ValueError, match="say one"):
        made.plan(4, speedup=2)
    errors = made.curve()
    assert made.plan(max_error=errors[5]).speedup >= 2
    with pytest.raises(ValueError, match="no plan"):
        made.plan(max_error=0)


def test_other_models_are_refused_and_finer_schedules_get_the_nearest_plan():
    made = calibration()
    with pytest.raises(ValueError, match="made for transformer A 1"):
        made.check_model({"transformer": "B 2"})
    finer = torch.linspace(1, 0, 2 * STEPS + 1)
    assert made.plan(4, times=finer).full_steps == tuple(2 * step for step in made.plan(4).full_steps)
    errors, plan = made.errors(times=finer), made.plan(4, times=finer)
    best, reuse = (lesa.sample_error(errors, plan, finer, forecaster) for forecaster in (None, lesa.Reuse()))
    assert best < 0.25 * reuse


def test_resampling_at_the_calibrated_times_changes_nothing():
    gram = calibration().streams["transformer", "cond"].gram
    torch.testing.assert_close(resample(gram, TIMES, TIMES).matrix, gram.matrix)


def test_an_even_plan_includes_the_first_and_the_last_step():
    shifted = 3 * TIMES / (1 + 2 * TIMES)
    for count in range(2, STEPS + 1):
        full = lesa.StepPlan.even(shifted, count).full_steps
        assert (len(full), full[0], full[-1]) == (count, 0, STEPS - 1)
    assert lesa.StepPlan.even(TIMES, 1).full_steps == (0,)


def test_calibrated_digits_are_closer_to_the_full_sampler_than_the_papers_plan(tmp_path, caplog):
    from lesa.demo.model import load_pipeline, request

    pipeline = load_pipeline()
    made = lesa.calibrate(pipeline, [request(range(8), range(100, 108))], search=False, progress=False, out=tmp_path)
    again = lesa.calibrate(pipeline, [request(range(8), range(100, 108))], search=False, progress=False, out=tmp_path)
    assert again.samples == made.samples == 8

    def images() -> torch.Tensor:
        return pipeline(**request(range(8), range(8))).images

    full = images()
    with lesa.enable(pipeline, tmp_path, speedup=5):
        best = (images() - full).square().mean()
    with lesa.enable(pipeline, lesa.Taylor(2), lesa.StepPlan.paper(50, 7)):
        paper = (images() - full).square().mean()
    with lesa.enable(pipeline, speedup=5):
        uncalibrated = (images() - full).square().mean()
    assert "nothing is calibrated" in caplog.text
    assert best < 0.05 * paper
    assert uncalibrated < 0.05 * paper


def test_refining_selects_the_plan_with_the_closest_samples():
    pipeline, call = tiny.pipeline(), tiny.arguments(seed=9)
    calibration = lesa.calibrate(pipeline, [call], search=False, progress=False)
    full = tiny.generate(pipeline, seed=9)

    def distance(plan):
        with lesa.enable(pipeline, calibration, plan):
            return float((tiny.generate(pipeline, seed=9) - full).square().mean())

    expected = calibration.plan(4)
    rivals = candidate_plans(calibration.errors(), calibration.times, expected, 5)
    assert rivals[0] == expected
    assert len(set(rivals)) == 5
    assert {len(plan.full_steps) for plan in rivals} == {4}
    gains = lesa.refine_plans(pipeline, calibration, [call], [4], candidates=5, progress=False)
    assert calibration.plan(4) == min(rivals, key=distance)
    assert gains[4] == pytest.approx((min(map(distance, rivals)) / distance(expected)) ** 0.5)
    assert gains[4] <= 1
    with pytest.raises(ValueError, match="no prompts"):
        lesa.refine_plans(pipeline, calibration, [], [4])
