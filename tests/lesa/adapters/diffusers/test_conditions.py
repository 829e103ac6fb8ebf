"""Conditions: a prediction is used only under the conditions for which it was made."""

import pytest
import torch

import lesa
from lesa import LesaWarning, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.conditions import Conditions
from tests.lesa.adapters.diffusers.families import FAMILIES, Loop
from tests.lesa.adapters.diffusers.guided import Guided
from tests.lesa.adapters.diffusers.tiny import STEPS

PLAN = StepPlan(12, [0, 1, 4, 7])


def full_and_predicted(handle):
    """All full steps and all predicted steps of the latest generation, in any branch."""
    return [sorted(s for r in handle.records for s in getattr(r, kind)) for kind in ("full", "predicted")]


class Named(Loop):
    """A loop whose pipeline names its branch."""

    def __call__(self, change=lambda step, inputs: None):
        with self.transformer.cache_context("cond"):
            return super().__call__(change)


def condition_of(inputs):
    """The name of the input that holds the prompt or the class."""
    return next(name for name in ("encoder_hidden_states", "class_labels") if name in inputs)


def other(tensor):
    """Another valid prompt or class."""
    return (tensor + 1) % 8 if tensor.dtype == torch.long else tensor * 1.5


@pytest.mark.parametrize("when", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Named, Loop], ids=["named", "unnamed"])
def test_a_new_prompt_is_not_predicted_from_features_of_the_old_prompt(predicted_path, kind, when):
    loop, forecaster = kind("flux"), Reuse()
    text = other(loop.inputs["encoder_hidden_states"])

    def change(step, inputs):
        if step == when:
            inputs["encoder_hidden_states"] = text

    untouched = loop(change)
    with lesa.enable(loop, forecaster, PLAN) as handle:
        outputs = loop(change)
    full, predicted = full_and_predicted(handle)
    assert full == sorted({*PLAN.full_steps, when})
    assert predicted == [step for step in PLAN.predicted_steps if step != when]
    assert torch.equal(outputs[0], untouched[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_changed_in_place_is_noticed_in_inference_mode(name):
    loop = Loop(name)
    with torch.inference_mode():
        loop.inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in loop.inputs.items()}
        prompt = loop.inputs[condition_of(loop.inputs)]

        def write(step, inputs):
            if step == 5:
                prompt.copy_(other(prompt))

        with lesa.enable(loop, Reuse(), PLAN) as handle:
            loop(write)
    assert 5 in full_and_predicted(handle)[0]
    assert 6 in full_and_predicted(handle)[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_new_tensors_with_equal_values_are_the_same_conditions(name):
    loop = Loop(name)

    def copy_conditions(step, inputs):
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and key != "hidden_states":
                inputs[key] = value.clone()

    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop(copy_conditions)
    assert full_and_predicted(handle) == [list(PLAN.full_steps), list(PLAN.predicted_steps)]


def test_a_changed_number_in_the_arguments_is_a_changed_condition(predicted_path):
    loop = Loop("flux")
    loop.inputs["joint_attention_kwargs"] = {"scale": 1.0}
    with lesa.enable(loop, Reuse(), PLAN) as handle:
        loop(lambda step, inputs: inputs.update(joint_attention_kwargs={"scale": 1.0 if step < 5 else 0.5}))
    assert full_and_predicted(handle) == [[0, 1, 4, 5, 7], [2, 3, 6, 8, 9, 10, 11]]


def test_conditions_that_change_at_every_step_give_a_warning():
    loop = Loop("flux")
    generator = torch.Generator().manual_seed(0)

    def new(step, inputs):
        inputs["encoder_hidden_states"] = torch.randn(2, 3, 8, generator=generator)

    with lesa.enable(loop, Reuse(), PLAN) as handle, pytest.warns(LesaWarning, match="more than 8 calls"):
        loop(new)
    assert full_and_predicted(handle)[1] == []


def test_conditions_in_other_memory_are_compared_by_value():
    tensor = torch.arange(6.0)
    known = Conditions({"x": torch.zeros(1), "c": tensor, "flag": True, "parts": [tensor[:3], {"s": 0.5}]}, {"x"})

    def call(c=tensor, flag=True, scale=0.5):
        return {"x": torch.ones(2), "c": c, "flag": flag, "parts": [c[:3], {"s": scale}]}

    assert known.are_in(call())
    assert known.are_in(call(tensor.view(6)))
    assert not known.are_in(call(tensor.clone()))
    assert known.are_still(call(tensor.clone()))
    assert not known.are_still(call(tensor + 1))
    assert not known.are_still(call(tensor.double()))
    assert not known.are_still(call(flag=False))
    assert not known.are_still(call(scale=0.25))
    assert not known.are_still(call() | {"more": None})
    tensor += 1
    assert not known.are_still(call())
    tensor -= 1
    assert known.are_still(call())


@pytest.mark.parametrize("windows", [8, 9, 17])
def test_only_the_first_eight_calls_of_a_step_are_predicted(windows, predicted_path):
    """Each call is predicted from its own features or runs in full, never from the features of another window."""
    loop = Guided()
    condition, latents = loop.conditions["cond"], torch.randn(windows, 2, 16, 4)

    @torch.no_grad()
    def sample(latents=latents):
        loop.scheduler.set_timesteps(STEPS)
        outputs = []
        for t in loop.scheduler.timesteps:
            outputs.append(
                [
                    loop.components["transformer"](hidden_states=x, timestep=t.expand(2) / 1000, **condition).sample
                    for x in latents
                ]
            )
            loop.scheduler.step(outputs[-1][0], t, latents[0])
        return outputs

    untouched = sample()
    plan = StepPlan(STEPS, [0, 1, 4, 7])
    with lesa.enable(loop, Reuse(), plan) as handle:
        if windows > 8:
            with pytest.warns(LesaWarning):
                enabled = sample()
        else:
            enabled = sample()
    for window in range(windows):
        with lesa.enable(loop, Reuse(), plan):
            alone = sample(latents[window : window + 1])
        for step in range(STEPS):
            expected = untouched[step][window] if window >= 8 else alone[step][0]
            assert torch.equal(enabled[step][window], expected)
    assert sum(len(r.predicted) for r in handle.records) == 8 * len(plan.predicted_steps)


def test_several_calls_per_step_of_a_named_branch_run_in_full(predicted_path):
    loop = Guided()
    latents = torch.randn(2, 2, 16, 4)

    @torch.no_grad()
    def sample():
        loop.scheduler.set_timesteps(STEPS)
        outputs = []
        for t in loop.scheduler.timesteps:
            with loop.components["transformer"].cache_context("cond"):
                for x in latents:
                    made = loop.components["transformer"](
                        hidden_states=x, timestep=t.expand(2) / 1000, **loop.conditions["cond"]
                    )
                    outputs.append(made.sample)
            loop.scheduler.step(outputs[-1], t, latents[0])
        return outputs

    untouched = sample()
    with lesa.enable(loop, Reuse(), StepPlan(STEPS, [0, 1, 4, 7])), pytest.warns(LesaWarning, match="several calls"):
        enabled = sample()
    assert all(map(torch.equal, enabled, untouched))
