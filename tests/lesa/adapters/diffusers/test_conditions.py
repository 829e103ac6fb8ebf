"""A prediction is used only under the conditions that it was made for."""

import pytest
import torch

import lesa
from lesa import LesaWarning, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.conditions import Conditions
from tests.lesa.adapters.diffusers.families import FAMILIES, Loop
from tests.lesa.adapters.diffusers.guided import Guided
from tests.lesa.adapters.diffusers.tiny import STEPS

PLAN = StepPlan(12, [0, 1, 4, 7])


def steps(handle):
    """All full and all predicted steps of the latest generation, of all branches."""
    return [sorted(s for r in handle.records for s in getattr(r, kind)) for kind in ("full", "predicted")]


class Named(Loop):
    """A loop whose pipeline names its branch."""

    def __call__(self, change=lambda step, inputs: None):
        with self.transformer.cache_context("cond"):
            return super().__call__(change)


def condition_of(inputs):
    return next(name for name in ("encoder_hidden_states", "class_labels") if name in inputs)


def other(tensor):
    return (tensor + 1) % 8 if tensor.dtype == torch.long else tensor * 1.5


@pytest.mark.parametrize("when", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Named, Loop], ids=["named", "unnamed"])
def test_a_new_prompt_is_not_predicted_from_features_of_the_old_one(way, kind, when):
    loop, forecaster = kind("flux"), Reuse()
    text = other(loop.inputs["encoder_hidden_states"])

    def change(step, inputs):
        if step == when:
            inputs["encoder_hidden_states"] = text

    untouched = loop(change)
    with lesa.enable(loop, forecaster, PLAN) as handle:
        outputs = loop(change)
    full, predicted = steps(handle)
    assert full == sorted({*PLAN.full_steps, when})
    assert predicted == [step for step in PLAN.predicted_steps if step != when]
    assert torch.equal(outputs[0], untouched[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_is_written_to_is_noticed_in_inference_mode(name):
    loop = Loop(name)
    with torch.inference_mode():
        loop.inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in loop.inputs.items()}
        prompt = loop.inputs[condition_of(loop.inputs)]

        def write(step, inputs):
            if step == 5:
                prompt.copy_(other(prompt))

        with lesa.enable(loop, Reuse(), PLAN) as handle:
            loop(write)
    assert 5 in steps(handle)[0]
    assert 6 in steps(handle)[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_conditions_in_new_tensors_at_every_step_are_no_change(name):
    loop = Loop(name)

    def new_tensors(step, inputs):
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and key != "hidden_states":
                inputs[key] = value.clone()

    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop(new_tensors)
    assert steps(handle) == [list(PLAN.full_steps), list(PLAN.predicted_steps)]


def test_a_condition_that_is_a_number_is_compared_by_value(way):
    loop = Loop("flux")
    loop.inputs["joint_attention_kwargs"] = {"scale": 1.0}
    with lesa.enable(loop, Reuse(), PLAN) as handle:
        loop(lambda step, inputs: inputs.update(joint_attention_kwargs={"scale": 1.0 if step < 5 else 0.5}))
    assert steps(handle) == [[0, 1, 4, 5, 7], [2, 3, 6, 8, 9, 10, 11]]


def test_conditions_that_are_always_new_are_reported():
    loop = Loop("flux")
    generator = torch.Generator().manual_seed(0)

    def new(step, inputs):
        inputs["encoder_hidden_states"] = torch.randn(2, 3, 8, generator=generator)

    with lesa.enable(loop, Reuse(), PLAN) as handle, pytest.warns(LesaWarning, match="more than 8 calls"):
        loop(new)
    assert steps(handle)[1] == []


def test_values_are_compared_if_the_memory_is_another():
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
def test_windows_beyond_eight_calls_a_step_run_in_full(windows, way):
    """Each call is predicted from its own features or runs in full, never from those of the next window."""
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


def test_windows_of_a_named_branch_run_in_full(way):
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
