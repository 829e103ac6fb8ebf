"""The memories of a generation: the history of a table, and the window of a KAN predictor."""

import functools
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lesa
from lesa import Reuse, StepPlan, Taylor
from lesa.predictor.window import FeatureWindow
from lesa.runtime.accelerator import Accelerator
from lesa.runtime.buffer_layout import BufferLayout
from lesa.runtime.driver import Call
from lesa.runtime.history import FeatureHistory
from lesa.tables.table import CoefficientTable
from lesa_kernels import combine
from tests.lesa.predictors import closed_loop, kan_predictor
from tests.lesa.strategies import plans, schedule


def run(memory, plan, features):
    """The features [steps, ...] of a generation: full steps are kept, the others are predicted by the memory."""
    made = []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            memory.keep(step, features[step])
            made.append(features[step])
        else:
            assert memory.can_predict(step)
            made.append(memory.predict(step).clone())
    return torch.stack(made)


@given(plans(max_steps=14), st.integers(0, 999))
def test_a_history_predicts_by_its_table_and_keeps_as_few_rows_as_possible(plan, seed):
    generator = torch.Generator().manual_seed(seed)
    used = torch.rand(len(plan.predicted_steps), len(plan.full_steps), generator=generator) < 0.4
    causal = torch.tensor(plan.predicted_steps).unsqueeze(1) > torch.tensor(plan.full_steps)
    coefficients = torch.randn(used.shape, generator=generator, dtype=torch.float64) * used * causal
    table = CoefficientTable(plan, schedule(plan.num_steps), coefficients, torch.randn(len(used), generator=generator))
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64, generator=generator)
    history = FeatureHistory(table)
    made = run(history, plan, features)
    full = features[list(plan.full_steps)]
    expected = torch.einsum("sj,j...->s...", table.coefficients, full) + table.bias[:, None, None]
    torch.testing.assert_close(made[list(plan.predicted_steps)], expected)
    alive = [
        sum(
            full <= step
            and any(p >= step and row[j] != 0 for p, row in zip(plan.predicted_steps, coefficients, strict=True))
            for j, full in enumerate(plan.full_steps)
        )
        for step in range(plan.num_steps)
    ]
    assert history.num_rows == max(*alive, bool(plan.predicted_steps))


def test_a_step_can_be_predicted_only_after_its_features_are_kept():
    plan = StepPlan(6, [0, 2, 4])
    history = FeatureHistory(Taylor(1).table(plan, schedule(6)))
    history.keep(0, torch.randn(3))
    assert history.can_predict(1)
    assert not history.can_predict(3)  # needs step 2
    assert not history.can_predict(2)  # a full step
    history.keep(2, torch.randn(3))
    assert history.can_predict(3)
    history.clear()
    assert history.nbytes == 0
    assert not history.can_predict(3)


def test_a_history_holds_only_its_rows():
    plan, feature = StepPlan(10, [0, 3, 6]), torch.randn(4, 5).bfloat16()
    for forecaster, rows in ((Reuse(), 1), (Taylor(1), 2), (Taylor(5), 3)):
        history = FeatureHistory(forecaster.table(plan, schedule(10)))
        run(history, plan, feature.expand(10, 4, 5))
        assert history.nbytes == rows * feature.nbytes


@pytest.mark.parametrize("plan", [StepPlan.paper(10, 4), StepPlan(10, [0]), StepPlan(10, [0, 2, 4, 6, 8])])
def test_a_window_predicts_as_the_papers_closed_loop(plan):
    predictor, features = kan_predictor(), torch.randn(10, 2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = closed_loop(predictor, plan, schedule(10), features)
    window = predictor.make_memory(plan, schedule(10), None)
    made = run(window, plan, features)[list(plan.predicted_steps)]
    torch.testing.assert_close(made, expected)
    assert window.nbytes == 16 * features[0].nbytes
    window.clear()
    assert window.nbytes == 0


def test_a_window_slides_if_there_are_more_steps_than_rows():
    plan = StepPlan(40, [0, 1])
    predictor, features = kan_predictor(40), torch.randn(40, 6, dtype=torch.float64) * 0.1
    with torch.no_grad():
        for layer in predictor.latent:
            layer.weight.mul_(0.05)
        expected = closed_loop(predictor, plan, schedule(40), features)
    torch.testing.assert_close(run(predictor.make_memory(plan, schedule(40), None), plan, features)[2:], expected)


def test_the_buffer_layout_of_a_table_is_computed_once_and_shared(monkeypatch):
    plan, features, layouts = StepPlan(10, [0, 3, 6]), torch.randn(10, 4, 5), functools.cache(BufferLayout)
    table = Taylor(1).table(plan, schedule(10))
    expected = run(FeatureHistory(table, make_layout=layouts), plan, features)
    monkeypatch.delattr(BufferLayout, "__init__")  # fails if the layout is computed again
    assert torch.equal(run(FeatureHistory(table, make_layout=layouts), plan, features), expected)
    made = run(FeatureHistory(table, make_layout=layouts), plan, features.double())
    torch.testing.assert_close(made, expected.double())


def test_a_table_and_its_device_copies_are_freed_with_the_history():
    plan = StepPlan(10, [0, 3, 6])
    table = Taylor(1).table(plan, schedule(10))
    history = FeatureHistory(table)
    run(history, plan, torch.randn(10, 4, 5))
    coming = history.predict_interval(7)
    left = [weakref.ref(thing) for thing in (table, history, coming.coefficients, coming.history)]
    del table, history, coming
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


@pytest.mark.parametrize("bias", [0.0, 2.5])
def test_a_table_with_only_a_bias_predicts_the_bias(bias):
    plan, features = StepPlan(6, [0, 3]), torch.randn(6, 4, 5)
    table = CoefficientTable(plan, schedule(6), torch.zeros(4, 2), torch.full((4,), bias))
    history = FeatureHistory(table)
    made = run(history, plan, features)
    assert torch.equal(made[list(plan.predicted_steps)], torch.full((4, 4, 5), bias))
    assert history.nbytes == features[0].nbytes
    coming = history.predict_interval(4)
    assert coming.steps == [4, 5]
    assert torch.equal(combine(coming.history, coming.coefficients, coming.bias), torch.full((2, 4, 5), bias))


def test_a_prediction_without_its_features_raises_and_names_the_missing_steps():
    plan = StepPlan(10, [0, 1, 4, 7])
    history = FeatureHistory(Taylor(1).table(plan, schedule(10)))
    for ask in (history.predict, history.predict_interval):
        with pytest.raises(ValueError, match=r"step 5 is made of the features of the full steps 1, 4"):
            ask(5)
    history.keep(4, torch.randn(3))
    for ask in (history.predict, history.predict_interval):
        with pytest.raises(ValueError, match=r"step 5 is made of the features of the full steps 1,"):
            ask(5)
        with pytest.raises(ValueError, match=r"nothing is predicted of step 7"):
            ask(7)
    window = kan_predictor().make_memory(plan, schedule(10), None)
    with pytest.raises(ValueError, match=r"step 2 is made of the steps before it"):
        window.predict(2)
    window.keep(0, torch.randn(3))
    with pytest.raises(ValueError, match=r"step 2 is made of the steps before it"):
        window.predict(2)


def test_an_interval_ends_before_the_step_whose_features_are_missing():
    plan = StepPlan(6, [0, 2])
    coefficients = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 1]])
    history = FeatureHistory(CoefficientTable(plan, schedule(6), coefficients))
    history.keep(2, torch.ones(3))  # step 0 is missing, as after a change of the prompt
    coming = history.predict_interval(3)
    assert coming.steps == [3, 4]
    assert len(coming.coefficients) == 2
    assert not history.can_predict(5)


@pytest.mark.parametrize("make", [FeatureHistory, FeatureWindow])
def test_features_of_another_batch_size_or_shape_are_refused(make):
    plan = StepPlan(10, [0, 1, 4, 7])
    memory = (
        FeatureHistory(Taylor(1).table(plan, schedule(10)))
        if make is FeatureHistory
        else kan_predictor().make_memory(plan, schedule(10), None)
    )
    feature = torch.randn(2, 4, 6)
    memory.keep(0, feature)
    for other in (feature[:1], feature[:, :1], feature[0], torch.randn(2, 4, 1), torch.randn(())):
        with pytest.raises(ValueError, match=r"the feature of step 1 is .*, those kept are \[2, 4, 6\]"):
            memory.keep(1, other)
    memory.keep(1, feature)
    assert memory.can_predict(2)


def test_integer_features_are_refused():
    plan = StepPlan(4, [0, 2])
    for memory in (
        FeatureHistory(Reuse().table(plan, schedule(4))),
        kan_predictor(4).make_memory(plan, schedule(4), None),
    ):
        with pytest.raises(ValueError, match=r"the feature is torch\.int64"):
            memory.keep(0, torch.ones(3, dtype=torch.int64))


def test_features_are_kept_centred_if_they_are_large_and_not_rounded():
    plan = StepPlan(6, [0, 2, 4])
    table = Taylor(1).table(plan, schedule(6))
    cases = ((128, torch.float32, True), (128, torch.float64, True), (128, torch.bfloat16, False))
    for tokens, dtype, centred in (*cases, (3, torch.float32, False)):  # for a small feature it is not worth it
        features = (10 + torch.randn(6, tokens, 64)).to(dtype)
        plain, history = FeatureHistory(table), FeatureHistory(table, centre=True)
        for step in plan.full_steps:
            plain.keep(step, features[step])
            history.keep(step, features[step])
        assert history.predict_interval(5).centred == centred
        assert (history.predict(5).mean(-1).abs().max() < 1e-4) == centred
        expected, given = (torch.nn.functional.layer_norm(h.predict(5), (64,)) for h in (plain, history))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_changed_weights_are_used_in_the_next_generation():
    """A table is cached for a schedule, but not after the weights of its predictor have changed."""
    predictor = lesa.LesaPredictor(lesa.LesaConfig(6, hidden_dim=2))
    plan, times = lesa.StepPlan(6, [0, 1, 3]), torch.linspace(1, 0, 7, dtype=torch.float64)
    accelerator = Accelerator(predictor, plan)
    features = torch.randn(6, 4, dtype=torch.float64)

    def predicted():
        generation, made = object(), {}
        for step in range(6):
            if accelerator.begin(Call("transformer", "cond", step, times, generation, ())):
                made[step] = accelerator.predict("head").clone()
            else:
                accelerator.keep("head", features[step])
            accelerator.end(failed=False)
        return torch.stack([made[step] for step in plan.predicted_steps])

    before = predicted()
    assert torch.equal(predicted(), before)
    with torch.no_grad():
        for layer in predictor.latent:
            layer.weight.add_(0.5)
    after, table = predicted(), predictor.table(plan, times)
    expected = table.coefficients @ features[list(plan.full_steps)] + table.bias[:, None]
    torch.testing.assert_close(after, expected)
    assert not torch.equal(after, before)
