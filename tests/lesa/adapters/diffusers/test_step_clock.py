"""Noise levels and the step of a call, for every kind of scheduler and from any start."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa import LesaConfig, LesaPredictor, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.noise_levels import noise_levels
from lesa.adapters.diffusers.step_clock import nearest_step
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.probes import PLAN, call_at
from tests.lesa.adapters.diffusers.tiny import STEPS, generate
from tests.lesa.strategies import schedule

aten = torch.ops.aten

# name: arguments of the scheduler
SCHEDULERS = {
    "CogVideoXDDIMScheduler": {},
    "DDIMScheduler": {},
    "DDPMScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "EDMEulerScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
}
FLOW_SCHEDULERS = {
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
}
every_scheduler = pytest.mark.parametrize(
    ("name", "options"),
    [*SCHEDULERS.items(), *FLOW_SCHEDULERS.items()],
    ids=[*SCHEDULERS, *(f"{name} flow" for name in FLOW_SCHEDULERS)],
)
SECOND_ORDER = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}


def make(name, options):
    """A scheduler by the name of its class."""
    scheduler = getattr(diffusers, name)(**options)
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda latents, t: latents  # the pipeline calls this on every scheduler
    return scheduler


def plan_of(times):
    """The paper's plan for a schedule of any length."""
    return StepPlan.paper(len(times) - 1, 4)


@pytest.fixture(scope="module")
def dit():
    """A pipeline that works with any scheduler, has no branch names and runs guidance in one batch."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    ).eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4)
    made = DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def sample(dit, steps=STEPS):
    """The images of a call with a fixed seed."""
    torch.manual_seed(0)  # the pipeline gives no generator to schedulers that add noise
    return dit([1, 2], num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images


@every_scheduler
def test_the_noise_level_is_the_share_of_noise_in_the_schedulers_mixture(name, options):
    scheduler = make(name, options)
    scheduler.set_timesteps(STEPS)
    levels = noise_levels(scheduler)
    assert levels.dtype == torch.float64
    assert len(levels) == len(scheduler.timesteps) + 1
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    between = 2 if name == "KDPM2DiscreteScheduler" else 1  # it cannot look up the times of its second evaluations
    for t, level in list(zip(scheduler.timesteps, levels, strict=False))[::between]:
        add = getattr(scheduler, "add_noise", None) or (lambda x, e, t: scheduler.scale_noise(x, t, e))
        if name == "FlowMatchHeunDiscreteScheduler":
            add = scale_noise_like_euler(scheduler)
        image, noise = float(add(one, none, t[None])), float(add(none, one, t[None]))
        assert float(level) == pytest.approx(noise / (image + noise), abs=2e-5)


def scale_noise_like_euler(scheduler):
    """The Heun scheduler cannot look up its repeated times; its mixture is that of Euler at the same sigmas."""

    def add(image, noise, t):
        sigma = float(scheduler.sigmas[int((scheduler.timesteps == t).nonzero()[0])])
        return (1 - sigma) * image + sigma * noise

    return add


@every_scheduler
def test_each_evaluation_of_the_transformer_is_one_step(dit, name, options):
    dit.scheduler = make(name, options)
    evaluations, kind = [], type(dit.scheduler)
    handle = dit.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    expected = sample(dit)
    handle.remove()
    assert len(evaluations) == {True: 2 * STEPS - 1}.get(name in SECOND_ORDER, len(dit.scheduler.timesteps))
    every = lambda times: StepPlan(len(times) - 1, range(len(times) - 1))  # noqa: E731
    with lesa.enable(dit, Reuse(), every):
        assert (sample(dit) == expected).all()
    with lesa.enable(dit, Taylor(1), plan_of) as enabled:
        first = sample(dit)
        for _ in range(2):
            (record,) = enabled.records
            plan = StepPlan.paper(len(evaluations), 4)
            assert (tuple(record.full), tuple(record.predicted)) == (plan.full_steps, plan.predicted_steps)
            assert (sample(dit) == first).all()
    assert type(dit.scheduler) is kind
    assert (sample(dit) == expected).all()


class Synchronizations(TorchDispatchMode):
    """Counts operators that make the host wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_only_the_first_step_synchronizes_with_the_device(dit, name, monkeypatch):
    dit.scheduler = make(name, {})
    waits, calls = {}, []
    with lesa.enable(dit, Taylor(1), plan_of):
        kind = type(dit.transformer)
        call = kind.__call__

        def watched(self, *args, **kwargs):
            with Synchronizations() as seen:
                result = call(self, *args, **kwargs)
            waits[len(calls)] = seen.count
            calls.append(1)
            return result

        monkeypatch.setattr(kind, "__call__", watched)
        sample(dit)
        monkeypatch.undo()
    assert waits[0] > 0  # the first call reads the times of the schedule
    assert not any(waits[step] for step in range(1, len(calls)))


def test_copies_of_a_scheduler_are_not_counted(dit):
    dit.scheduler = scheduler = diffusers.DDIMScheduler()
    with lesa.enable(dit, Reuse(), plan_of):
        sample(dit)
        assert scheduler.steps_taken == STEPS
        for other in (copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert type(other) is diffusers.DDIMScheduler
            other.step(torch.zeros(1), int(other.timesteps[0]), torch.zeros(1))
            assert scheduler.steps_taken == STEPS
    assert not hasattr(scheduler, "steps_taken")


def test_the_first_time_gives_the_first_step_of_a_generation():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(30)
    timesteps = scheduler.timesteps
    for step in (0, 1, 11, 29):
        time = timesteps[step]
        for given in (time, time.expand(2), time / 1000, (time / 1000).bfloat16(), time.repeat(3) * torch.eye(3)):
            assert nearest_step(given, timesteps, scheduler) == step
    assert nearest_step(1 - timesteps[0] / 1000, timesteps, scheduler) == 0  # Lumina's time grows from 0 to 1
    assert nearest_step(torch.zeros(1), torch.tensor([1000.0, 600.0, 0.0]), scheduler) == 0  # a schedule may end at 0
    heun = diffusers.HeunDiscreteScheduler()
    heun.set_timesteps(5)
    assert nearest_step(heun.timesteps[4], heun.timesteps, heun) == 3  # the earlier of two steps with the same time


def test_a_transformer_without_a_pipeline_uses_the_given_times(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = generate(pipeline)
    sigmas = pipeline.scheduler.sigmas.clone()
    for times in (sigmas, None):
        with lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
            for _ in range(2):
                torch.testing.assert_close(generate(pipeline), expected)
                assert tuple(handle.records[0].full) == PLAN.full_steps
    with lesa.enable(pipeline.transformer, Taylor(1, "time"), PLAN), pytest.raises(ValueError, match="needs the times"):
        generate(pipeline)
    with (
        lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=sigmas * 0.9),
        pytest.raises(ValueError, match="not in times"),
    ):
        generate(pipeline)
    with pytest.raises(ValueError, match="two steps of times= are at the same time"):
        lesa.enable(pipeline.transformer, Taylor(1), StepPlan(3, [0]), times=[1.0, 0.5, 0.5, 0.0])
    with (
        lesa.enable(pipeline.transformer, Taylor(1), StepPlan(4, [0, 1])),
        pytest.raises(ValueError, match="for 4 steps and this generation goes on"),
    ):
        generate(pipeline)


def test_a_table_is_refused_for_another_schedule_or_plan(pipeline):
    generate(pipeline)
    table = Taylor(1).table(PLAN, pipeline.scheduler.sigmas)
    with lesa.enable(pipeline, table):
        generate(pipeline)
        with pytest.raises(ValueError, match="another schedule"):
            pipeline(**tiny.arguments(), sigmas=[1 - 0.09 * i for i in range(STEPS)])
    with pytest.raises(ValueError, match="made for the plan"):
        lesa.enable(pipeline, table, StepPlan(STEPS, [0, 5]))


def test_plans_and_tables_are_computed_once_for_each_schedule(pipeline):
    made = []

    class Counting(Reuse):
        def table(self, plan, times):
            made.append("table")
            return super().table(plan, times)

    def plan(times):
        made.append("plan")
        return StepPlan.paper(len(times) - 1, 4)

    with lesa.enable(pipeline, Counting(), plan):
        for _ in range(3):
            generate(pipeline)
        assert made == ["plan", "table"]
        generate(pipeline, steps=12)
        assert made == ["plan", "table"] * 2
    with lesa.enable(pipeline, Reuse(), lambda times: StepPlan(3, [0])), pytest.raises(ValueError, match="of 10 steps"):
        generate(pipeline)


# --- generations that start part-way through their schedule


def test_a_transformer_that_starts_part_way_uses_the_remaining_plan(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for time in times[3:-1]:
            call_at(pipeline.transformer, time)
    assert (handle.records[0].full, handle.records[0].predicted) == ([3, 4, 7], [5, 6, 8, 9])


@pytest.fixture
def from_image():
    """FLUX image to image, and a function that calls it."""
    text = tiny.pipeline()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=1,
        sample_size=64,
        shift_factor=0.0,
    ).eval()
    made = diffusers.FluxImg2ImgPipeline(**{**text.components, "vae": vae})
    made.set_progress_bar_config(disable=True)

    def run(strength, guidance=1.0, steps=STEPS):
        given = tiny.arguments(guidance=guidance, steps=steps)
        return made(**given, image=torch.rand(2, 3, 64, 64, generator=given["generator"]), strength=strength).images

    return made, run


@pytest.mark.parametrize(
    ("strength", "full", "predicted"),
    [(1.0, [0, 1, 4, 7], [2, 3, 5, 6, 8, 9]), (0.8, [2, 4, 7], [3, 5, 6, 8, 9]), (0.3, [7], [8, 9]), (0.1, [9], [])],
)
def test_image_to_image_uses_the_remaining_plan(from_image, predicted_path, strength, full, predicted):
    pipeline, run = from_image
    untouched = run(strength, guidance=3.0)
    guided = not torch.equal(run(strength), untouched)  # some releases of diffusers need a negative prompt as text
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        first = run(strength, guidance=3.0)
        assert [(r.branch, r.full, r.predicted) for r in handle.records] == [
            (branch, full, predicted) for branch in ("call0", "call1")[: 1 + guided]
        ]
        run(0.5)
        assert torch.equal(run(strength, guidance=3.0), first)
    assert torch.equal(first, untouched) == (not predicted)
    assert torch.equal(run(strength, guidance=3.0), untouched)


def test_every_forecaster_works_for_image_to_image(from_image):
    pipeline, run = from_image
    gram = lesa.GramMatrix(STEPS)
    for step in range(STEPS):
        gram.update(step, torch.randn(2, 5, 8))
    run(1.0)
    table = Taylor(1).table(PLAN, pipeline.scheduler.sigmas)
    window = LesaPredictor(LesaConfig(STEPS, hidden_dim=4, latent="kan"))
    for forecaster in (Reuse(), table, lesa.LeastSquares(gram), LesaPredictor(LesaConfig(STEPS, hidden_dim=4)), window):
        with lesa.enable(pipeline, forecaster, PLAN) as handle:
            assert bool(run(0.8).isfinite().all())
            assert handle.records[0].predicted == [3, 5, 6, 8, 9]


def test_a_plan_function_is_called_with_the_remaining_times(from_image):
    pipeline, run = from_image
    given_times = []

    def plan(times):
        given_times.append(times)
        return StepPlan.paper(len(times) - 1, 3)

    with lesa.enable(pipeline, Taylor(1), plan) as handle:
        run(0.8)
        assert torch.equal(given_times[0], noise_levels(pipeline.scheduler)[2:])
        assert handle.records[0].full == [step + 2 for step in StepPlan.paper(8, 3).full_steps]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_start_part_way_is_found_without_set_begin_index(dit, name):
    """Video to video of CogVideoX and Wan cut the timesteps and do not call set_begin_index."""
    dit.scheduler = scheduler = make(name, {})
    with torch.no_grad(), lesa.enable(dit, Taylor(1), PLAN) as handle:
        for _ in range(2):
            scheduler.set_timesteps(STEPS)
            latents, label = torch.randn(1, 4, 4, 4), torch.tensor([1])
            for t in scheduler.timesteps[3:]:
                output = dit.transformer(latents, timestep=t.expand(1), class_labels=label).sample
                latents = scheduler.step(output, t, latents).prev_sample
            (record,) = handle.records
            assert (record.full, record.predicted) == ([3, 4, 7], [5, 6, 8, 9])
