"""The guard: prediction errors at full steps, warnings and extra full steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa import Guard, LeastSquares, LesaConfig, LesaWarning, Reuse, StepPlan, Taylor, Trajectories
from lesa.runtime import history as history_module
from lesa.runtime.guard import make_probes
from lesa.runtime.history import FeatureHistory
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.tiny import STEPS, generate
from tests.lesa.predictors import closed_loop, kan_predictor, random_predictor
from tests.lesa.strategies import gram_of, plans, schedule

PLAN = StepPlan(STEPS, [0, 1, 4, 7])
STREAM = ("transformer", "cond")


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


def generate_with(pipeline, change):
    """A generation whose latents a callback changes after step 5."""

    def callback(pipe, step, time, state):
        return {"latents": change(state["latents"])} if step == 5 else {}

    return pipeline(**tiny.arguments(), callback_on_step_end=callback).images


def forecaster_named(name, plan):
    """A forecaster by its name in the parameters of a test."""
    if name == "LESA":
        return random_predictor(LesaConfig(plan.num_steps, hidden_dim=4))
    return {"reuse": Reuse(), "Taylor": Taylor(2)}[name]


def probes_of(forecaster, plan, times):
    """The prediction of each full step of a plan from the full steps before it."""
    return make_probes(lambda other: forecaster.table(other, times), plan)


@given(plans(max_steps=12), st.sampled_from(["LESA", "reuse", "Taylor"]))
def test_a_full_step_is_compared_with_the_prediction_of_a_plan_without_it(plan, name):
    forecaster, times = forecaster_named(name, plan), schedule(plan.num_steps)
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    history = FeatureHistory(forecaster.table(plan, times), probes_of(forecaster, plan, times))
    for slot, step in enumerate(plan.full_steps):
        figures = history.prediction_error(step, features[step])
        history.keep(step, features[step])
        if step == 0:
            assert figures is None
            continue
        without = StepPlan(plan.num_steps, [full for full in plan.full_steps if full != step])
        table = forecaster.table(without, times)
        row = without.predicted_steps.index(step)
        full = features[list(without.full_steps)]
        predicted = torch.einsum("j,j...->...", table.coefficients[row], full) + table.bias[row]
        expected = torch.stack([(features[step] - predicted).square().sum(), features[step].square().sum()])
        torch.testing.assert_close(figures, expected)
        assert table.coefficients[row, slot:].count_nonzero() == 0


class NoCopies(TorchDispatchMode):
    """A test inside this mode fails if features [rows, 2, 3] are copied."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        new = isinstance(made, torch.Tensor) and function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone)
        assert not (new and made.ndim == 3), "features were copied"
        return made


@given(plans(max_steps=12), st.sampled_from(["LESA", "reuse", "Taylor"]), st.integers(0, 99))
def test_a_revised_plan_continues_with_the_kept_features(plan, name, seed):
    forecaster, times = forecaster_named(name, plan), schedule(plan.num_steps)
    at = plan.full_steps[seed % len(plan.full_steps)]
    later = [step for step in plan.predicted_steps if step > at]
    if not later:
        return
    revised = StepPlan(plan.num_steps, (*plan.full_steps, later[seed % len(later)]))
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    first = history = FeatureHistory(forecaster.table(plan, times), probes_of(forecaster, plan, times), spare=1)
    table = forecaster.table(revised, times)
    for step in range(plan.num_steps):
        if step == at:
            probes = probes_of(forecaster, revised, times)
            with NoCopies():
                history = FeatureHistory(table, probes, previous=first)
        if revised.is_full(step) and (step >= at or plan.is_full(step)):
            if step > 0:
                assert history.prediction_error(step, features[step]) is not None
            history.keep(step, features[step])
        elif step > at:
            row = revised.predicted_steps.index(step)
            full = features[list(revised.full_steps)]
            expected = torch.einsum("j,j...->...", table.coefficients[row], full) + table.bias[row]
            assert history.can_predict(step)
            torch.testing.assert_close(history.predict(step), expected)


def test_probes_need_extra_rows_only_for_features_that_are_not_kept_anyway():
    plan = StepPlan.paper(20, 5)
    for forecaster, more in ((random_predictor(LesaConfig(20, hidden_dim=4)), 1), (Taylor(1), 0), (Reuse(), 0)):
        table = forecaster.table(plan, schedule(20))
        plain = FeatureHistory(table).num_rows
        assert FeatureHistory(table, probes_of(forecaster, plan, schedule(20)), spare=1).num_rows == plain + more


def test_the_window_of_a_kan_predictor_measures_prediction_errors():
    plan, predictor = StepPlan(10, [0, 1, 5]), kan_predictor()
    features = torch.randn(10, 2, 6, dtype=torch.float64)
    window = predictor.make_memory(plan, schedule(10), None)
    assert window.prediction_error(0, features[0]) is None
    for step in range(5):
        window.keep(step, features[step]) if plan.is_full(step) else window.predict(step)
    with torch.no_grad():
        predicted = closed_loop(predictor, StepPlan(10, [0, 1]), schedule(10), features)[3]
    torch.testing.assert_close(window.prediction_error(5, features[5])[0], (features[5] - predicted).square().sum())
    moved = predictor.make_memory(StepPlan(10, [0, 1, 5, 7]), schedule(10), window)
    moved.keep(5, features[5])
    assert moved.can_predict(6)
    assert not moved.can_predict(7)


def assert_equal_up_to_rounding(result, expected):
    """A guard keeps features with their means; without a guard the means are left out, which rounds differently."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_report_has_the_error_of_each_full_step_and_the_result_is_unchanged(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        unguarded = generate(pipeline, guidance=3.0)
    with lesa.enable(pipeline, Taylor(1), PLAN, guard=Guard()) as handle:
        assert handle.report() == {}
        assert_equal_up_to_rounding(generate(pipeline, guidance=3.0), unguarded)
        report = handle.report()
    assert set(report) == {("transformer", "cond"), ("transformer", "uncond")}
    for errors in report.values():
        assert list(errors) == [1, 4, 7]
        assert all(0 < error < 2 for error in errors.values())


def test_without_a_guard_no_prediction_error_is_computed(pipeline, monkeypatch):
    monkeypatch.setattr(history_module, "prediction_error", None)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        generate(pipeline)
        with pytest.raises(ValueError, match="guard=lesa"):
            handle.report()


@pytest.mark.parametrize("name", ["LESA", "Taylor", "reuse"])
def test_extra_full_steps_run_one_interval_after_a_large_error(pipeline, name):
    forecaster = forecaster_named(name, PLAN)
    with lesa.enable(pipeline, forecaster, PLAN, guard=Guard(max_error=1e-9, extra_steps=2)) as handle:
        with pytest.warns(LesaWarning, match="off by"):
            result = generate(pipeline)
        (record,) = handle.records
    # the error of step 1 is read at step 4, which halves the interval 4 to 7; the error of step 4 is read at step 5
    assert record.monitor.extra == [5, 6]
    assert record.full == [0, 1, 4, 5, 6, 7]
    assert list(handle.report()[STREAM]) == [1, 4, 5, 6, 7]
    fixed = StepPlan(STEPS, record.full)
    with lesa.enable(pipeline, forecaster, fixed):
        assert_equal_up_to_rounding(generate(pipeline), result)  # as with this plan from the start


def test_good_predictions_need_no_extra_full_step(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN, guard=Guard(max_error=10, extra_steps=5)) as handle:
        generate(pipeline)
        assert handle.records[0].full == list(PLAN.full_steps)


def test_a_guard_warns_only_if_latents_differ_from_the_calibration(pipeline):
    calls = [tiny.arguments(seed=seed) for seed in range(2)]
    forecaster = LeastSquares(gram_of(lesa.collect(pipeline, calls)))
    with lesa.enable(pipeline, forecaster, PLAN, guard=Guard()) as handle:
        generate(pipeline, seed=0)
        own = handle.report()[STREAM]
        with pytest.warns(LesaWarning, match="calibrated"):
            generate_with(pipeline, lambda latents: 10 * latents.flip(0))
    assert max(own.values()) < 1


def test_a_gram_matrix_gives_the_expected_error_of_any_forecaster(pipeline):
    gram = gram_of(lesa.collect(pipeline, [tiny.arguments(seed=0)], progress=False))
    for calibration in (gram, {STREAM: gram}):
        with lesa.enable(pipeline, Taylor(1), PLAN, guard=Guard(calibration=calibration)) as handle:
            generate(pipeline, seed=0)
            (record,) = handle.records
            # the latents of the calibration, except for the effect of the predictions
            assert record.monitor.expected == pytest.approx(handle.report()[STREAM], rel=0.2)
    with lesa.enable(pipeline, Taylor(1), StepPlan(6, [0, 2, 4]), guard=Guard(calibration=gram)) as handle:
        generate(pipeline, steps=6)
        assert handle.records[0].monitor.expected == {}  # the calibration has another number of steps
        assert list(handle.report()[STREAM]) == [2, 4]


def test_the_expected_error_is_the_error_on_the_calibration_features():
    features = torch.randn(3, STEPS, 5).cumsum(1)
    forecaster = LeastSquares(gram_of(Trajectories(schedule(STEPS), [{STREAM: features}])))
    table = forecaster.table(PLAN, schedule(STEPS))
    made = torch.einsum("sj,bjd->bsd", table.coefficients, features[:, list(PLAN.full_steps)].double())
    made += table.bias[:, None]
    true = features[:, list(PLAN.predicted_steps)].double()
    expected = (made - true).square().sum((0, 2)).sqrt() / true.square().sum((0, 2)).sqrt()
    torch.testing.assert_close(forecaster.expected_error(table)[list(PLAN.predicted_steps)], expected)


def test_invalid_guard_settings_are_refused_before_the_first_step(pipeline):
    table = Taylor(1).table(PLAN, schedule(STEPS))
    with pytest.raises(ValueError, match="needs the forecaster"):
        lesa.enable(pipeline, table, guard=Guard())
    for wrong in ({"max_error": 0.0}, {"factor": -1.0}, {"extra_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Guard(**wrong)
