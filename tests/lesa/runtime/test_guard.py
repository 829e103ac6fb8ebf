"""Predictions compared with the truth at full steps, and the extra full steps that follow."""

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
from tests.lesa.predictors import closed_loop, kan_predictor, trained_size
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


def forecaster(name, plan):
    if name == "LESA":
        return trained_size(LesaConfig(plan.num_steps, hidden_dim=4))
    return {"reuse": Reuse(), "Taylor": Taylor(2)}[name]


def probes_of(made_by, plan, times):
    return make_probes(lambda other: made_by.table(other, times), plan)


@given(plans(max_steps=12), st.sampled_from(["LESA", "reuse", "Taylor"]))
def test_a_full_step_is_compared_with_what_a_plan_without_it_predicts(plan, name):
    made_by, times = forecaster(name, plan), schedule(plan.num_steps)
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    history = FeatureHistory(made_by.table(plan, times), probes_of(made_by, plan, times))
    for slot, step in enumerate(plan.full_steps):
        figures = history.prediction_error(step, features[step])
        history.keep(step, features[step])
        if step == 0:
            assert figures is None
            continue
        without = StepPlan(plan.num_steps, [full for full in plan.full_steps if full != step])
        table = made_by.table(without, times)
        row = without.predicted_steps.index(step)
        full = features[list(without.full_steps)]
        predicted = torch.einsum("j,j...->...", table.coefficients[row], full) + table.bias[row]
        expected = torch.stack([(features[step] - predicted).square().sum(), features[step].square().sum()])
        torch.testing.assert_close(figures, expected)
        assert table.coefficients[row, slot:].count_nonzero() == 0


class NoCopies(TorchDispatchMode):
    """Inside, no tensor of features [rows, 2, 3] is made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        new = isinstance(made, torch.Tensor) and function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone)
        assert not (new and made.ndim == 3), "features were copied"
        return made


@given(plans(max_steps=12), st.sampled_from(["LESA", "reuse", "Taylor"]), st.integers(0, 99))
def test_a_revised_plan_goes_on_with_the_features_that_are_kept(plan, name, seed):
    made_by, times = forecaster(name, plan), schedule(plan.num_steps)
    at = plan.full_steps[seed % len(plan.full_steps)]
    later = [step for step in plan.predicted_steps if step > at]
    if not later:
        return
    revised = StepPlan(plan.num_steps, (*plan.full_steps, later[seed % len(later)]))
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    first = history = FeatureHistory(made_by.table(plan, times), probes_of(made_by, plan, times), spare=1)
    table = made_by.table(revised, times)
    for step in range(plan.num_steps):
        if step == at:
            probes = probes_of(made_by, revised, times)
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


def test_probes_take_no_memory_if_all_features_are_kept():
    plan = StepPlan.paper(20, 5)
    for made_by, more in ((trained_size(LesaConfig(20, hidden_dim=4)), 1), (Taylor(1), 0), (Reuse(), 0)):
        table = made_by.table(plan, schedule(20))
        plain = FeatureHistory(table).num_rows
        assert FeatureHistory(table, probes_of(made_by, plan, schedule(20)), spare=1).num_rows == plain + more


def test_a_predictor_without_a_table_is_compared_too():
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


def assert_same_sums(result, expected):
    """Features that are compared are kept with their means, which the sums without a guard leave out from the start."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_report_has_the_error_of_every_full_step_and_the_result_is_unchanged(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        unwatched = generate(pipeline, guidance=3.0)
    with lesa.enable(pipeline, Taylor(1), PLAN, guard=Guard()) as handle:
        assert handle.report() == {}
        assert_same_sums(generate(pipeline, guidance=3.0), unwatched)
        report = handle.report()
    assert set(report) == {("transformer", "cond"), ("transformer", "uncond")}
    for errors in report.values():
        assert list(errors) == [1, 4, 7]
        assert all(0 < error < 2 for error in errors.values())


def test_without_a_guard_nothing_is_compared(pipeline, monkeypatch):
    monkeypatch.setattr(history_module, "prediction_error", None)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        generate(pipeline)
        with pytest.raises(ValueError, match="guard=lesa"):
            handle.report()


@pytest.mark.parametrize("name", ["LESA", "Taylor", "reuse"])
def test_extra_steps_are_spent_one_interval_after_a_large_error(pipeline, name):
    made_by = forecaster(name, PLAN)
    with lesa.enable(pipeline, made_by, PLAN, guard=Guard(max_error=1e-9, extra_steps=2)) as handle:
        with pytest.warns(LesaWarning, match="off by"):
            result = generate(pipeline)
        (record,) = handle.records
    # that step 1 is off is known at 4, which halves 4..7; that 4 is off is known at 5
    assert record.monitor.extra == [5, 6]
    assert record.full == [0, 1, 4, 5, 6, 7]
    assert list(handle.report()[STREAM]) == [1, 4, 5, 6, 7]
    fixed = StepPlan(STEPS, record.full)
    with lesa.enable(pipeline, made_by, fixed):
        assert_same_sums(generate(pipeline), result)  # as if the plan had been so from the start


def test_small_errors_cost_no_extra_step(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN, guard=Guard(max_error=10, extra_steps=5)) as handle:
        generate(pipeline)
        assert handle.records[0].full == list(PLAN.full_steps)


def test_a_calibrated_forecaster_warns_only_outside_its_calibration(pipeline):
    calls = [tiny.arguments(seed=seed) for seed in range(2)]
    made_by = LeastSquares(gram_of(lesa.collect(pipeline, calls)))
    with lesa.enable(pipeline, made_by, PLAN, guard=Guard()) as handle:
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
            # the same latents as in the calibration, but for what the predictions have changed
            assert record.monitor.expected == pytest.approx(handle.report()[STREAM], rel=0.2)
    with lesa.enable(pipeline, Taylor(1), StepPlan(6, [0, 2, 4]), guard=Guard(calibration=gram)) as handle:
        generate(pipeline, steps=6)
        assert handle.records[0].monitor.expected == {}  # of another number of steps it knows nothing
        assert list(handle.report()[STREAM]) == [2, 4]


def test_the_expected_error_is_the_one_on_the_calibration_features():
    features = torch.randn(3, STEPS, 5).cumsum(1)
    made_by = LeastSquares(gram_of(Trajectories(schedule(STEPS), [{STREAM: features}])))
    table = made_by.table(PLAN, schedule(STEPS))
    made = torch.einsum("sj,bjd->bsd", table.coefficients, features[:, list(PLAN.full_steps)].double())
    made += table.bias[:, None]
    true = features[:, list(PLAN.predicted_steps)].double()
    expected = (made - true).square().sum((0, 2)).sqrt() / true.square().sum((0, 2)).sqrt()
    torch.testing.assert_close(made_by.expected_error(table)[list(PLAN.predicted_steps)], expected)


def test_impossible_guards_are_refused(pipeline):
    table = Taylor(1).table(PLAN, schedule(STEPS))
    with pytest.raises(ValueError, match="needs the forecaster"):
        lesa.enable(pipeline, table, guard=Guard())
    for wrong in ({"max_error": 0.0}, {"factor": -1.0}, {"extra_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Guard(**wrong)
