"""Known output heads: precomputed outputs equal those of skipped blocks and of the closed loop, for all families."""

import pytest
import torch

import lesa
from lesa import LesaConfig, LesaPredictor, LesaWarning, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS, find_output_head
from lesa.runtime.driver import Driver
from tests.lesa.adapters.diffusers.families import FAMILIES, Loop
from tests.lesa.adapters.diffusers.probes import assert_predicted_paths_agree, operators_of
from tests.lesa.predictors import random_predictor

PLAN = StepPlan(12, [0, 1, 2, 6, 9])


class ClosedLoop(Driver):
    """Samples as the paper does: a window of features, one predicted step at a time, every prediction written back."""

    def __init__(self, predictor, plan):
        self.predictor, self.plan, self.window = predictor, plan, []

    def begin(self, call):
        self.call = call
        if call.step == 0:
            self.window = []
        return not self.plan.is_full(call.step)

    def keep(self, head, feature):
        self.window.append(feature.clone())

    def predict(self, head):
        times = self.call.times
        self.window.append(self.predictor(torch.stack(self.window), times, times[self.call.step]))
        return self.window[-1]

    def end(self, *, failed):
        assert not failed


def small(predictor):
    """Weights that keep random features in range for a dozen predictions."""
    with torch.no_grad():
        for layer in predictor.latent:
            layer.weight.mul_(0.2)
    return predictor


@pytest.mark.parametrize("name", FAMILIES)
def test_precomputed_skipped_and_step_by_step_outputs_agree_in_float64(name, monkeypatch):
    loop = Loop(name, torch.float64)
    predictor = small(random_predictor(LesaConfig(12, hidden_dim=4)))
    assert find_output_head(loop.transformer) is not None
    assert_predicted_paths_agree(loop, name, predictor, PLAN, ClosedLoop(predictor, PLAN), monkeypatch)


@pytest.mark.parametrize("name", FAMILIES)
def test_precomputed_outputs_are_close_to_those_of_the_forward_in_bf16(name, monkeypatch):
    loop = Loop(name, torch.bfloat16)
    with lesa.enable(loop, Taylor(1), PLAN):
        precomputed = loop()
    monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
    with lesa.enable(loop, Taylor(1), PLAN):
        blocks_skipped = loop()
    for step in (3, 4, 5):  # later steps start from other latents
        error = (precomputed[step].float() - blocks_skipped[step].float()).abs().max() / blocks_skipped[
            step
        ].abs().max()
        assert error < 0.03


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_first_predicted_step_of_an_interval_runs_operators(name, monkeypatch):
    loop = Loop(name)
    call = type(loop.transformer).__call__
    counts = operators_of(loop, Taylor(1), PLAN, monkeypatch)
    assert type(loop.transformer).__call__ is call
    firsts = [step for step in PLAN.predicted_steps if PLAN.is_full(step - 1)]
    assert [step for step in PLAN.predicted_steps if counts[step] > 0] == firsts
    assert max(counts[step] for step in firsts) < min(counts[step] for step in PLAN.full_steps) / 2


def test_only_modules_of_the_output_head_run_on_a_predicted_step():
    loop, ran, now = Loop("flux"), [], 0
    for name, module in loop.transformer.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append((now, name)))

    def change(step, inputs):
        nonlocal now
        now = step

    with lesa.enable(loop, Reuse(), PLAN):
        loop(change)
    predicted = {name.split(".")[0] for step, name in ran if not PLAN.is_full(step)}
    assert predicted <= {"time_text_embed", "norm_out"}
    later = {step for step, _ in ran if not PLAN.is_full(step)}
    assert later == {3}  # where the modulations of all steps are computed


def test_precomputed_outputs_are_dropped_when_the_prompt_changes():
    loop = Loop("flux")

    def replaced(step, inputs):
        if step == 4:
            inputs["pooled_projections"] = inputs["pooled_projections"] * 1.5

    def written(step, inputs):
        if step == 4:
            inputs["pooled_projections"].mul_(1.5)

    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop()
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
        for change in (replaced, written):
            loop(change)
            # step 4 runs in full: the kept features are of another prompt, and the plan continues as after a first step
            assert [step for r in handle.records for step in r.full] == [0, 1, 2, 4, 6, 9]
            assert [step for r in handle.records for step in r.predicted] == [3, 5, 7, 8, 10, 11]


def test_precomputed_outputs_are_dropped_when_an_input_becomes_none():
    loop = Loop("qwen image")
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop(lambda step, inputs: inputs.update(encoder_hidden_states_mask=None) if step == 4 else None)
    assert handle.records[0].predicted == [3, 5, 7, 8, 10, 11]


def test_each_output_has_its_own_memory():
    loop = Loop("flux")
    with lesa.enable(loop, Reuse(), PLAN):
        outputs = loop()
        kept = [output.clone() for output in outputs]
        loop()
    assert all(torch.equal(a, b) for a, b in zip(outputs, kept, strict=True))
    pointers = [output.data_ptr() for output in outputs]
    assert len(set(pointers)) == len(pointers)


def test_a_wrapped_output_head_is_not_known_and_the_forward_runs():
    loop = Loop("flux")
    with lesa.enable(loop, Taylor(1), PLAN):
        expected = loop()

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    plain = loop.transformer.proj_out

    def wrap(step, inputs):
        if step == 4:
            loop.transformer.proj_out = Wrapped(plain)

    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop(wrap)  # wrapped during a generation: that step runs in full
        assert handle.records[0].full == [0, 1, 2, 4, 6, 9]
        for ours, theirs in zip(loop(), expected, strict=True):  # wrapped before a generation
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
    assert find_output_head(loop.transformer) is None


def test_arguments_that_the_known_output_head_lacks_run_the_forward():
    loop = Loop("flux")
    loop.inputs["joint_attention_kwargs"] = {"scale": 1.0}
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop()
    assert handle.records[0].predicted == list(PLAN.predicted_steps)


def test_every_known_output_head_has_a_family_here():
    assert {type(Loop(name).transformer).__name__ for name in FAMILIES} == set(OUTPUT_HEADS)


def test_a_predictor_without_a_table_predicts_step_by_step():
    loop = Loop("dit")
    predictor = LesaPredictor(LesaConfig(12, hidden_dim=4, latent="kan"))
    with lesa.enable(loop, predictor, PLAN) as handle:
        loop()
    assert handle.records[0].predicted == list(PLAN.predicted_steps)


def test_a_batch_that_shrinks_during_a_generation_runs_a_full_step():
    loop = Loop("wan")

    def shrink(step, inputs):
        if step == 7:
            inputs["hidden_states"], inputs["encoder_hidden_states"] = (
                inputs[k][:1] for k in ("hidden_states", "encoder_hidden_states")
            )

    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        outputs = loop(shrink)
    assert [len(output) for output in outputs] == [2] * 7 + [1] * 5
    assert handle.records[0].predicted == [3, 4, 5, 8, 10, 11]
    text = loop.inputs["encoder_hidden_states"]
    with lesa.enable(loop, Reuse(), PLAN), pytest.warns(LesaWarning, match="no step"):
        loop(lambda step, inputs: inputs.update(encoder_hidden_states=text[:, step % 2 :]))
