"""Coefficients of each channel: every way through a predicted step gives what a step-by-step sum in float64 gives."""

import pytest
import torch

import lesa
from lesa import GramMatrix, Guard, LeastSquares, StepPlan
from lesa.adapters.diffusers import observe
from lesa.runtime.observer import Observer
from tests.lesa.adapters.families import FAMILIES, Loop
from tests.lesa.adapters.probes import PLAN, assert_ways_agree, operators_of, record
from tests.lesa.adapters.tiny import STEPS, generate

LONG = StepPlan(STEPS, [0, 1])  # its interval is longer than what is made from one reading of the features


class StepByStep:
    """Keeps every full feature in float64 and makes one prediction at a time, channel by channel."""

    def __init__(self, forecasters, plan):
        self.forecasters, self.plan, self.kept, self.predictions = forecasters, plan, {}, 0

    def begin(self, call):
        self.call = call
        return not self.plan.is_full(call.step)

    def keep(self, head, feature):
        self.kept[self.call.branch, self.call.step] = feature.double()
        self.dtype = feature.dtype

    def predict(self, head):
        self.predictions += 1
        table = self.forecasters[self.call.component, self.call.branch].table(self.plan, self.call.times)
        row = self.plan.predicted_steps.index(self.call.step)
        total = table.bias[row]
        for coefficients, full in zip(table.coefficients[row], self.plan.full_steps, strict=True):
            if full < self.call.step:
                total = total + coefficients * self.kept[self.call.branch, full]
        return total.to(self.dtype)

    def coming(self, head):
        return None

    def end(self, *, failed):
        assert not failed

    def reset(self, session=None):
        pass


def fitted(features, steps):
    """Least squares by channel for each branch, from its features by (branch, step)."""
    grams = {}
    for (branch, step), feature in features.items():
        gram = grams.setdefault(("transformer", branch), GramMatrix(steps, channels=feature.shape[-1]))
        gram.update(step, feature)
    return {stream: LeastSquares(gram, ridge=1e-3, per_channel=True) for stream, gram in grams.items()}


@pytest.fixture
def forecasters(pipeline, guidance):
    return fitted(record(pipeline, guidance=guidance, seed=1)[0], STEPS)


@pytest.mark.parametrize("plan", [PLAN, LONG], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_samples_what_the_sum_step_by_step_gives(pipeline, forecasters, way, plan, guidance):
    with lesa.enable(pipeline, forecasters, plan) as handle:
        result = generate(pipeline, guidance=guidance)
    assert [record.predicted for record in handle.records] == [list(plan.predicted_steps)] * len(forecasters)
    step_by_step = StepByStep(forecasters, plan)
    with observe(pipeline, step_by_step):
        expected = generate(pipeline, guidance=guidance)
    assert step_by_step.predictions == len(plan.predicted_steps) * len(forecasters)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    shared = {stream: LeastSquares(f.gram, ridge=1e-3) for stream, f in forecasters.items()}
    with lesa.enable(pipeline, shared, plan):  # and it is not what one coefficient for all channels gives
        assert (generate(pipeline, guidance=guidance) - expected).abs().max() > 1e-3


def features_of(loop):
    features = {}
    with observe(loop, Observer(lambda call, f: features.__setitem__((call.branch, call.step), f.clone()))):
        loop()
    return features


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_made_ahead_and_blocks_handed_through_agree_with_it_in_float64(name, monkeypatch):
    loop, plan = Loop(name, torch.float64), StepPlan(12, [0, 1, 2, 10])
    forecasters = fitted(features_of(loop), 12)
    assert_ways_agree(loop, name, forecasters, plan, StepByStep(forecasters, plan), monkeypatch)


def test_steps_after_the_first_of_an_interval_run_no_operator(monkeypatch):
    loop, plan = Loop("flux"), StepPlan(12, [0, 1, 9])
    counts = operators_of(loop, fitted(features_of(loop), 12), plan, monkeypatch)
    assert [step for step in plan.predicted_steps if counts[step] > 0] == [2, 10]


@pytest.mark.parametrize("guidance", [3.0])
def test_a_limit_and_a_guard_work_with_them(pipeline, forecasters, guidance):
    class Limited:
        def __init__(self, forecaster):
            self.forecaster = forecaster

        def table(self, plan, times):
            return self.forecaster.table(plan, times).limited(2)

    limited = {stream: Limited(forecaster) for stream, forecaster in forecasters.items()}
    with observe(pipeline, StepByStep(limited, PLAN)):
        expected = generate(pipeline, guidance=guidance)
    with lesa.enable(pipeline, forecasters, PLAN, max_history=2, guard=Guard(factor=1e6)) as handle:
        result = generate(pipeline, guidance=guidance)
        errors = handle.report()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    for stream in forecasters:
        assert list(errors[stream]) == list(PLAN.full_steps[1:])
        assert all(0 < error < 1 for error in errors[stream].values())
    with lesa.enable(pipeline, forecasters, PLAN, guard=Guard(max_error=1e-9, extra_steps=2)) as handle:
        with pytest.warns(lesa.LesaWarning, match="would have been predicted"):
            generate(pipeline, guidance=guidance)
        assert [len(record.full) for record in handle.records] == [len(PLAN.full_steps) + 2] * 2


@pytest.mark.parametrize("guidance", [1.0])
def test_features_with_other_channels_are_refused_at_the_first_step(pipeline, forecasters, guidance):
    (stream,) = forecasters
    gram = GramMatrix(STEPS, channels=5)
    for step in range(STEPS):
        gram.update(step, torch.randn(4, 5))
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    with (
        lesa.enable(pipeline, {stream: LeastSquares(gram, per_channel=True)}, PLAN),
        pytest.raises(ValueError, match="each of 5 channels"),
    ):
        generate(pipeline)
    assert len(calls) <= 1
