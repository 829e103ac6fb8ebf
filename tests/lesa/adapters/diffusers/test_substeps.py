"""Steps that are divided into substeps: the mean output over a step, its correction, and who may be divided."""

import functools
import itertools

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import lesa
from benchmarks.evaluations import Heun
from lesa import LesaWarning, Multistep, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers.euler import reason_not_divisible
from lesa.tables.evaluation_times import evaluation_times
from lesa.tables.substeps import FINE, Substeps
from tests.lesa.adapters.diffusers import tiny

TIMES = torch.linspace(1, 0, 6, dtype=torch.float64) ** 1.3  # a schedule of five uneven steps


class Loop:
    """Euler's method in float64 around a bare transformer, with one or two branches of guidance."""

    def __init__(self, guidance=1.0, batch=2):
        self.transformer = tiny.pipeline().transformer.double()
        self.guidance = guidance
        self.sign = 1.0  # of the prompt
        self.arguments = tiny.arguments(batch=batch)
        generator = torch.Generator().manual_seed(5)
        self.start = torch.randn(batch, 16, 4, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, times, start=None):
        x = self.start if start is None else start
        for time, following in itertools.pairwise(times):
            x = x + (following - time) * self._velocity(x, float(time))
        return x

    def _velocity(self, x, time):
        prompts = {"cond": self.sign} if self.guidance == 1 else {"cond": 1.0, "uncond": -0.5}
        outputs = {}
        for branch, sign in prompts.items():
            with self.transformer.cache_context(branch):
                outputs[branch] = self.transformer(
                    hidden_states=x,
                    encoder_hidden_states=self._prompt(sign),
                    pooled_projections=self._prompt(sign)[:, 0],
                    timestep=torch.full((len(x),), time, dtype=x.dtype),
                    img_ids=self._image_ids(),
                    txt_ids=self._text_ids(),
                    return_dict=False,
                )[0]
        if self.guidance == 1:
            return outputs["cond"]
        return outputs["uncond"] + self.guidance * (outputs["cond"] - outputs["uncond"])

    @functools.cache  # noqa: B019 (the same memory at every step, as in pipelines)
    def _prompt(self, sign):
        return sign * self.arguments["prompt_embeds"].double()

    @functools.cache  # noqa: B019
    def _image_ids(self):
        ids = torch.zeros(4, 4, 3, dtype=torch.float64)
        ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)[None]
        return ids.reshape(-1, 3)

    @functools.cache  # noqa: B019
    def _text_ids(self):
        return torch.zeros(3, 3, dtype=torch.float64)


FORECASTERS = [Reuse(), Taylor(1, "time"), Taylor(2, "time"), Taylor(2)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("forecaster", FORECASTERS, ids=repr)
def test_substeps_within_a_call_equal_skipped_steps_of_the_fine_schedule(forecaster, guidance):
    loop, substeps = Loop(guidance), 7
    fine = Substeps.divide(TIMES, substeps)
    with lesa.enable(loop.transformer, forecaster, StepPlan(5, range(5)), substeps=substeps, times=TIMES):
        within = loop(TIMES)
    with lesa.enable(loop.transformer, forecaster, StepPlan(35, range(0, 35, substeps)), times=fine.times):
        skipped = loop(fine.times)
    plain = loop(TIMES)
    assert float((within - skipped).abs().max()) < 1e-10 * float(plain.abs().max())
    assert float((within - plain).abs().max()) > 1e-3  # the substeps changed something


@pytest.mark.parametrize("forecaster", [Taylor(1, "time"), Multistep()], ids=repr)
def test_one_substep_is_the_untouched_run_to_the_bit(forecaster):
    pipeline = tiny.pipeline()
    untouched = tiny.generate(pipeline, guidance=3.0)
    with lesa.enable(pipeline, forecaster, StepPlan(tiny.STEPS, range(tiny.STEPS)), substeps=1):
        assert torch.equal(tiny.generate(pipeline, guidance=3.0), untouched)


def test_predicted_steps_are_divided_as_well():
    loop = Loop()
    plan, fine = StepPlan(5, [0, 1, 3]), Substeps.divide(TIMES, 4)
    with lesa.enable(loop.transformer, Taylor(1, "time"), plan, substeps=4, times=TIMES):
        within = loop(TIMES)
    with lesa.enable(loop.transformer, Taylor(1, "time"), StepPlan(20, [0, 4, 12]), times=fine.times):
        skipped = loop(fine.times)
    assert float((within - skipped).abs().max()) < 1e-10 * float(skipped.abs().max())


@pytest.mark.parametrize(("correction", "output_share"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0)])
def test_the_mean_output_is_that_of_the_formulas(correction, output_share):
    """The same loop written out: features by a line in time, outputs by a line in time, and the trapezoidal rule."""
    loop, substeps = Loop(), 5
    features = []
    handle = loop.transformer.norm_out.register_forward_pre_hook(lambda module, args: features.append(args[0]))

    def head(feature, time):
        embed, arguments = loop.transformer.time_text_embed, loop._prompt(1.0)[:, 0]
        condition = embed(torch.full((2,), time * 1000, dtype=torch.float64), arguments)
        return loop.transformer.proj_out(loop.transformer.norm_out(feature, condition))

    x, kept, sent = loop.start, [], None
    for time, following in itertools.pairwise(TIMES.tolist()):
        features.clear()
        output = loop._velocity(x, time)
        kept = [*kept[-1:], (time, features[0], output)]
        inside = [time + (following - time) * i / substeps for i in range(substeps)]
        outputs = [output]
        for moment in inside[1:]:
            slope = 0.0 if len(kept) < 2 else (moment - time) / (kept[0][0] - time)
            outputs.append(head(torch.lerp(features[0], kept[0][1], slope), moment))
        mean = output if output_share == 1 and len(kept) < 2 else sum(outputs) / substeps
        if len(kept) == 2 and output_share:
            slope = (sum(inside) / substeps - time) / (kept[0][0] - time)
            mean = torch.lerp(mean, torch.lerp(output, kept[0][2], slope), output_share)
        length, result = time - following, mean
        if sent is not None and correction:
            (before, first, out), earlier = kept[0], []
            for i in range(substeps):
                share = i / substeps
                earlier.append(head(torch.lerp(first, features[0], share), before + (time - before) * share))
            path = sum(earlier) / substeps * (before - time)
            path = torch.lerp(path, (out + output) / 2 * (before - time), output_share)
            result = mean + correction * (path - sent) / length
        sent = mean * length
        x = x - length * result
    handle.remove()
    forecaster = Multistep(correction, output_share)
    with lesa.enable(loop.transformer, forecaster, StepPlan(5, range(5)), substeps=substeps, times=TIMES):
        found = loop(TIMES)
    assert float((found - x).abs().max()) < 1e-10 * float(x.abs().max())


def test_an_unknown_output_head_gets_the_mean_feature():
    """The mean of the features goes through the model's own head, at the time of the step."""
    loop = Loop()
    layers = loop.transformer.norm_out
    plan = StepPlan(5, range(5))
    with lesa.enable(loop.transformer, Taylor(1, "time"), plan, substeps=4, times=TIMES):
        exact = loop(TIMES)
    loop.transformer.proj_out = torch.nn.Sequential(loop.transformer.proj_out)  # is no linear layer any more
    plain = loop(TIMES)
    seen = []
    hook = layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lesa.enable(loop.transformer, Taylor(1, "time"), plan, substeps=4, times=TIMES):
        found = loop(TIMES)
    hook.remove()
    assert float((found - plain).abs().max()) > 1e-3
    assert float((found - exact).abs().max()) < float((plain - exact).abs().max())
    with lesa.enable(loop.transformer, Reuse(), plan, substeps=4, times=TIMES):
        assert torch.allclose(loop(TIMES), plain, rtol=1e-12, atol=1e-12)  # the mean of equal features


def test_a_generation_of_ten_evaluations_is_an_ordinary_run_of_ten_steps():
    pipeline, steps = tiny.pipeline(), []
    arguments = tiny.arguments(steps=10, guidance=3.0)
    with lesa.enable(pipeline, evaluations=10) as handle:
        pipeline(**arguments, callback_on_step_end=lambda p, step, t, kwargs: steps.append(float(t)) or kwargs)
        assert [(r.branch, len(r.full), len(r.predicted)) for r in handle.records] == [
            ("cond", 10, 0),
            ("uncond", 10, 0),
        ]
        assert [record.substeps for record in handle.records] == [FINE, FINE]
        assert "the mean over its step, 200 substeps in all" in handle.summary()
        feature = 2 * 16 * 32 * 4
        assert all(record.kept_bytes == 2 * feature for record in handle.records)
    assert len(steps) == 10


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_every_number_of_steps_has_at_most_as_many_evaluations(steps):
    pipeline = tiny.pipeline()
    with lesa.enable(pipeline, evaluations=10) as handle:
        for _ in range(2):
            tiny.generate(pipeline, steps=steps)
            assert len(handle.records[0].full) == min(steps, 10)


def test_the_scheduler_gets_the_times_and_is_restored():
    pipeline = tiny.pipeline()
    kind, before = type(pipeline.scheduler), tiny.generate(pipeline)
    own = pipeline.scheduler.sigmas.clone()
    with lesa.enable(pipeline, evaluations=10):
        tiny.generate(pipeline)
        chosen = pipeline.scheduler.sigmas.double()
        torch.testing.assert_close(chosen, evaluation_times(own, 10), rtol=1e-6, atol=1e-6)
        tiny.generate(pipeline, steps=25)
        assert float(pipeline.scheduler.sigmas[1]) > 0.96  # its own
        call = tiny.arguments()
        given = torch.linspace(1, 0.2, 10).square().tolist()
        pipeline(**call, sigmas=given)
        assert float(pipeline.scheduler.sigmas[-2]) < 0.1  # the caller's
    with lesa.enable(pipeline, evaluations=10, set_times=False):
        tiny.generate(pipeline)
        assert torch.equal(pipeline.scheduler.sigmas, own)
    assert type(pipeline.scheduler) is kind
    assert torch.equal(tiny.generate(pipeline), before)


def test_evaluation_times_lie_between_the_samplers_and_even_ones():
    own = 3.16 * torch.linspace(1, 1 / 50, 50, dtype=torch.float64)
    own = torch.cat([own / (1 + 2.16 * torch.linspace(1, 1 / 50, 50, dtype=torch.float64)), torch.zeros(1)])
    for count in (1, 2, 6, 20, 50):
        times = evaluation_times(own, count)
        assert (len(times), float(times[0]), float(times[-1])) == (count + 1, 1.0, 0.0)
        assert bool((times.diff() < 0).all())
        assert count == 1 or float(times[-2]) <= 0.03 + 1e-12
    ten = evaluation_times(own, 10)
    even = torch.linspace(1, float(ten[-2]), 10, dtype=torch.float64)
    assert bool((ten[1:9] > even[1:9]).all())
    assert bool((ten[1:9] < own[:-1:5][1:9]).all())


def test_substeps_follow_the_lengths_of_the_steps():
    fine = Substeps.divide(torch.tensor([1.0, 0.9, 0.1, 0.0], dtype=torch.float64))
    assert fine.first == (0, 20, 180, 200) == (0, 20, 180, FINE)
    assert float(fine.times[20]) == 0.9
    assert fine.weights[1] == pytest.approx([1 / 160] * 160)
    assert fine.plan(StepPlan(3, [0, 2])).full_steps == (0, 180)
    assert Substeps.divide([1.0, 1.0, 0.0], 3).weights[0] == pytest.approx([1 / 3] * 3)  # a step of no length


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


SOLVERS = {
    "dpm": (lambda: DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True), "DPMSolver"),
    "unipc": (lambda: UniPCMultistepScheduler(**FLOW), "UniPC"),
    "heun": (Heun, "Heun"),
    "stochastic": (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise"),
    "inverted": (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "counts from the image"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_other_solvers_are_refused_by_name_or_skip_steps(name):
    make, reason = SOLVERS[name]
    pipeline = tiny.pipeline()
    pipeline.scheduler = make()
    assert reason in reason_not_divisible(pipeline.scheduler)
    with pytest.raises(ValueError, match=reason):
        lesa.enable(pipeline, evaluations=4, substeps=20)
    if name == "inverted":
        return
    few = 2 if name == "heun" else 4  # Heun's steps have two evaluations
    with lesa.enable(pipeline, evaluations=4) as handle, pytest.warns(LesaWarning, match=reason):
        tiny.generate(pipeline, steps=few)
    assert not handle.records[0].predicted
    with lesa.enable(pipeline, evaluations=4) as handle:
        tiny.generate(pipeline, steps=24)
        assert len(handle.records[0].full) == 4
        assert len(handle.records[0].predicted) > 10


class OtherStep(FlowMatchEulerDiscreteScheduler):
    """A scheduler of a user, which does more than Euler's method."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def test_a_scheduler_with_its_own_step_is_not_divided():
    pipeline = tiny.pipeline()
    pipeline.scheduler = OtherStep.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="OtherStep has a step of its own"):
        lesa.enable(pipeline, evaluations=4, substeps=2)


def test_substeps_of_a_bare_transformer_need_its_times():
    with pytest.raises(ValueError, match=r"needs times="):
        lesa.enable(tiny.pipeline().transformer, Taylor(1), StepPlan(4, range(4)), substeps=2)
    with pytest.raises(ValueError, match="substeps must be a whole number of at least 1"):
        lesa.enable(tiny.pipeline(), evaluations=4, substeps=0)


@pytest.mark.parametrize("forecaster", [Taylor(1, "time"), Multistep()], ids=repr)
def test_a_new_prompt_half_way_continues_as_a_run_that_begins_there(forecaster):
    """Nothing of the old prompt is used: no feature, no output, no correction."""
    loop, plan = Loop(), StepPlan(5, range(5))
    with lesa.enable(loop.transformer, forecaster, plan, substeps=4, times=TIMES):
        begun = loop(TIMES[:3])
        loop.sign = -1.0
        found = loop(TIMES[2:], begun)
    with lesa.enable(loop.transformer, forecaster, plan, substeps=4, times=TIMES) as handle:
        expected = loop(TIMES[2:], begun)
        assert handle.records[0].full == [2, 3, 4]  # as image to image, which begins part-way
    assert torch.equal(found, expected)


@pytest.mark.parametrize("forecaster", [Taylor(1, "time"), Multistep()], ids=repr)
def test_a_second_generation_and_a_batch_of_two_equal_single_ones(forecaster):
    loop, plan = Loop(), StepPlan(5, range(5))
    with lesa.enable(loop.transformer, forecaster, plan, substeps=4, times=TIMES):
        first = loop(TIMES)
        assert torch.equal(loop(TIMES), first)
    single = Loop()
    single.arguments = {"prompt_embeds": loop.arguments["prompt_embeds"][1:]}
    with lesa.enable(single.transformer, forecaster, plan, substeps=4, times=TIMES):
        alone = single(TIMES, loop.start[1:])
    torch.testing.assert_close(alone, first[1:], rtol=1e-10, atol=1e-10)


def test_a_guard_measures_the_prediction_of_each_full_step():
    pipeline = tiny.pipeline()
    with lesa.enable(pipeline, evaluations=6, guard=lesa.Guard()) as handle:
        tiny.generate(pipeline, steps=6)
        (errors,) = handle.report().values()
    assert sorted(errors) == [1, 2, 3, 4, 5]
    assert all(0 < error < 1 for error in errors.values())


def test_a_calibration_of_a_fine_schedule_serves_any_number_of_evaluations(tmp_path):
    pipeline = tiny.pipeline()
    call = tiny.arguments(batch=4, steps=120)
    made = lesa.calibrate(pipeline, [call], search=False, progress=False, out=tmp_path)
    assert made.num_steps == 50  # of 120 measured
    assert (float(made.times[0]), float(made.times[-1])) == (1.0, 0.0)
    exact, plain = tiny.generate(pipeline, batch=4, steps=120), tiny.generate(pipeline, batch=4, steps=8)
    with lesa.enable(pipeline, tmp_path, evaluations=8) as handle:
        found = tiny.generate(pipeline, batch=4, steps=8)
        torch.testing.assert_close(pipeline.scheduler.sigmas.double(), made.evaluation_times(8), rtol=1e-6, atol=1e-6)
        assert len(handle.records[0].full) == 8
    assert float((found - exact).square().mean()) < 0.1 * float((plain - exact).square().mean())
