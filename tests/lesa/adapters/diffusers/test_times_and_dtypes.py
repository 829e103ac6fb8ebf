"""Times that differ from the schedule, schedules that count from the noise, and dtypes that differ from the weights."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
from lesa import Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.noise_levels import noise_levels
from lesa.adapters.diffusers.step_clock import TimestepClock, nearest_step
from lesa.adapters.diffusers.time_check import TimeCheck, agrees
from tests.lesa.adapters.diffusers.families import FAMILIES, Loop
from tests.lesa.adapters.diffusers.models import check
from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.probes import PLAN
from tests.lesa.adapters.diffusers.tiny import generate

PLAN12 = StepPlan(12, [0, 1, 4, 7])


class Altered(Loop):
    """Calls its transformer at times that differ from the schedule, as Detail-Daemon does."""

    def __init__(self, name, factor, steps=range(12)):
        super().__init__(name)
        self.factor, self.altered_steps = factor, steps

    @torch.no_grad()
    def __call__(self, change=lambda step, inputs: None):
        self.scheduler.set_timesteps(self.steps)
        latents, outputs = self.inputs["hidden_states"], []
        others = {name: value for name, value in self.inputs.items() if name != "hidden_states"}
        for step, t in enumerate(self.scheduler.timesteps):
            time = t.expand(len(latents)).to(self.dtype) / (1000 if self.unit == 1 else 1)
            time = time * (self.factor if step in self.altered_steps else 1)
            outputs.append(self.transformer(hidden_states=latents, timestep=time, **others, return_dict=False)[0])
            self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        return outputs


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [range(12), [5, 6, 9]], ids=["always", "at some steps"])
def test_a_time_that_differs_from_the_schedule_runs_the_forward(name, steps, monkeypatch):
    loop = Altered(name, 0.9, steps)
    with lesa.enable(loop, Reuse(), PLAN12) as handle:
        ours = loop()
    assert handle.records[0].predicted == list(PLAN12.predicted_steps)
    monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
    with lesa.enable(loop, Reuse(), PLAN12):
        of_the_forward = loop()
    for a, b in zip(ours, of_the_forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_times_rounded_by_a_pipeline_agree_with_the_schedule(dtype):
    for step in torch.linspace(1, 1000, 37):
        for given in (step.to(dtype) / 1000, (step / 1000).to(dtype), step.expand(3).to(dtype) / 1000):
            assert agrees(given, float(step) / 1000)
        assert not agrees((0.95 * step / 1000).to(dtype), float(step) / 1000)


class OnDevice(torch.Tensor):
    """A tensor that pretends to be on a GPU."""

    is_cuda = True


def test_a_wrong_time_on_a_gpu_is_noticed_when_its_copy_has_arrived(monkeypatch):
    """The first time is compared at once; later ones are copied to the host and compared when the copy has arrived."""
    arrived, empty = [], torch.empty
    event = type("Event", (), {"record": lambda self: None, "query": lambda self: bool(arrived)})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    check = TimeCheck()

    def passes(given, expected, check=check):
        return check.passes(torch.tensor(given).as_subclass(OnDevice), expected)

    assert passes(1.0, 1.0)
    assert passes(0.8, 0.9)
    assert passes(0.7, 0.7)
    arrived.append(True)
    assert not passes(0.6, 0.6)
    assert not passes(0.9, 1.0, TimeCheck())


def test_the_unit_of_times_is_the_same_for_the_whole_generation():
    clock = TimestepClock(None)
    steps = [clock.read({"timestep": torch.tensor([t])}, "transformer", None).step for t in (1000.0, 500.0, 1.0)]
    assert steps == [0, 1, 2]
    known = TimestepClock(torch.tensor([1.0, 0.5, 0.001, 0.0], dtype=torch.float64))
    for _ in range(2):
        steps = [known.read({"timestep": torch.tensor([t])}, "transformer", None).step for t in (1000.0, 500.0, 1.0)]
        assert steps == [0, 1, 2]


def test_a_time_that_matches_no_step_counts_as_the_first_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    assert nearest_step(0.95 * scheduler.timesteps[0], scheduler.timesteps, scheduler) == 0
    assert nearest_step(scheduler.timesteps[9], scheduler.timesteps, scheduler) == 9
    last = torch.tensor([1000.0, 500.0, 1.0])
    assert nearest_step(torch.tensor(1.0), last, scheduler) == 0
    assert nearest_step(torch.tensor(1.0), last, scheduler, thousands=True) == 2


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_inverted_sigmas_give_the_same_noise_levels(kind):
    plain, inverted = (getattr(diffusers, kind)(invert_sigmas=flag) for flag in (False, True))
    for scheduler in (plain, inverted):
        scheduler.set_timesteps(10)
    torch.testing.assert_close(noise_levels(inverted), noise_levels(plain), rtol=0, atol=1e-6)


def test_a_pipeline_with_inverted_sigmas_is_accelerated(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with lesa.enable(pipeline, Taylor(1, "time"), PLAN) as handle:
        generate(pipeline)
    assert handle.records[0].predicted == list(PLAN.predicted_steps)


@pytest.mark.parametrize("kind", ["KDPM2AncestralDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("steps", [3, 10, 30, 50])
def test_noise_levels_are_valid_for_timesteps_that_are_not_integers(kind, steps):
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) + 1


def test_qwen_image_with_its_key_value_cache_is_accelerated():
    """Step 0 fills the cache and has tokens of prompt and image; all other steps have tokens of the image only."""
    name = "QwenImage21Transformer2DModel"
    if name not in ROWS:
        pytest.skip("this diffusers has no Qwen-Image 2.1")
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    loop = check.Loop(name, ROWS[name])
    loop.transformer.register_to_config(causal_condition=True)
    inputs, cache = ROWS[name].inputs(1.0), None
    plan = StepPlan(6, [0, 1, 3])

    @torch.no_grad()
    def sample():
        nonlocal cache
        cache = module.QwenImage21KVCache(len(loop.transformer.transformer_blocks))
        loop.scheduler.set_timesteps(6)
        outputs = []
        for step, t in enumerate(loop.scheduler.timesteps):
            mode = "cached" if step else "extract"
            time = (t / 1000).expand(inputs["timestep"].shape)
            call = {**inputs, "timestep": time, "kv_cache": cache, "kv_cache_mode": mode}
            outputs.append(loop.transformer(**call).sample)
            loop.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        return outputs

    untouched = sample()
    assert untouched[0].shape != untouched[1].shape
    with lesa.enable(loop, Reuse(), plan) as handle:
        outputs = sample()
    assert [o.shape for o in outputs] == [o.shape for o in untouched]
    assert handle.records[-1].predicted == [2, 4, 5]
    assert all(torch.equal(outputs[s], untouched[s]) for s in plan.full_steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_predicted_steps_have_the_dtype_of_full_steps_under_autocast(name):
    loop = Loop(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = loop()
        with lesa.enable(loop, Reuse(), PLAN12) as handle:
            outputs = loop()
    assert handle.records[0].predicted == list(PLAN12.predicted_steps)
    assert [o.dtype for o in outputs] == [o.dtype for o in untouched]


class Int8(torch.nn.Module):
    """A linear layer of int8 weights and a scale."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale, layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_time_embeddings_are_not_cast_to_the_dtype_of_quantized_weights(monkeypatch):
    loop = Loop("wan")
    embedder = loop.transformer.condition_embedder.time_embedder
    embedder.linear_1, embedder.linear_2 = Int8(embedder.linear_1), Int8(embedder.linear_2)
    with lesa.enable(loop, Reuse(), PLAN12):
        precomputed = loop()
    monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
    with lesa.enable(loop, Reuse(), PLAN12):
        of_the_forward = loop()
    for a, b in zip(precomputed, of_the_forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
