"""Streams that take part in some steps only: a second transformer, image to image, guidance on a part of the steps."""

import pytest
import torch

import lesa
from lesa import Calibration
from tests.lesa.adapters.diffusers.guided import Guided
from tests.lesa.adapters.diffusers.tiny import STEPS
from tests.lesa.calibrations import products


class Loop(Guided):
    """A pipeline that :func:`lesa.calibrate` can call."""

    def __init__(self, transformers=1, start=0, **options):
        super().__init__(transformers)
        for name, transformer in self.components.items():
            setattr(self, name, transformer)
        self.start, self.options, self.outputs = start, {"named": True, **options}, {}

    @torch.no_grad()
    def __call__(self, prompt=None, generator=None):
        if self.start == 0:
            self.outputs = super().__call__(**self.options)
            return
        self.scheduler.set_timesteps(STEPS)
        self.scheduler.set_begin_index(self.start)
        latents, self.outputs = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)), {}
        for step, t in list(enumerate(self.scheduler.timesteps))[self.start :]:
            with self.transformer.cache_context("cond"):
                made = self.transformer(hidden_states=latents, timestep=t.expand(2) / 1000, **self.conditions["cond"])
            self.outputs["cond", step] = made.sample
            latents = self.scheduler.step(made.sample, t, latents).prev_sample


KINDS = {
    "two transformers": ({"transformers": 2, "order": ("cond",)}, {"transformer": (0, 5), "transformer_2": (5, 5)}),
    "guidance that ends early": ({"guided": range(6)}, {"cond": (0, STEPS), "uncond": (0, 6)}),
    "guidance that begins late": ({"guided": range(3, STEPS)}, {"cond": (0, STEPS), "uncond": (3, 7)}),
    "image to image": ({"start": 3}, {"cond": (0, 7)}),
}
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def range_of(stream, ranges):
    """The first step and the number of steps of a stream."""
    return next(ranges[name] for name in stream if name in ranges)


@for_every_kind
def test_each_stream_is_calibrated_on_its_own_steps_only(kind, tmp_path):
    options, ranges = KINDS[kind]
    loop = Loop(**options)
    made = lesa.calibrate(loop, [{}], progress=False)
    assert made.num_steps == STEPS - loop.start
    for stream, measured in made.streams.items():
        assert (measured.first, measured.gram.num_steps) == range_of(stream, ranges)
        assert measured.gram.count > 0
        assert measured.output_errors is not None
        assert measured.output_errors.num_steps == measured.gram.num_steps
        assert measured.output_errors.count > 0
    made.save(tmp_path)
    read = Calibration.load(tmp_path)
    assert [(m.first, m.gram.num_steps) for m in read.streams.values()] == [
        (m.first, m.gram.num_steps) for m in made.streams.values()
    ]
    assert not made.errors().vectors.requires_grad
    assert torch.equal(read.errors().vectors, made.errors().vectors)


@for_every_kind
def test_calibrated_streams_of_some_steps_have_under_a_quarter_of_reuse_error(kind):
    options, ranges = KINDS[kind]
    loop = Loop(**options)
    made = lesa.calibrate(loop, [{}], progress=False)
    loop()
    untouched = loop.outputs
    with lesa.enable(loop, lesa.Reuse(), lambda times: lesa.StepPlan(len(times) - 1, [0])):
        loop()
        reused = error(loop, untouched)
    with lesa.enable(loop, made, speedup=2) as handle:
        for _ in range(2):
            loop()
            assert all(record.predicted for record in handle.records)
            assert len(handle.records) == len(ranges)
            assert error(loop, untouched) < reused / 4


def error(loop, expected):
    """The squared error of the sample: each output is weighted by the length of its step."""
    length = -loop.scheduler.sigmas.diff()
    return sum(float((length[s] * (loop.outputs[b, s] - expected[b, s])).square().sum()) for b, s in expected)


def test_inner_products_of_some_steps_equal_those_of_all_steps():
    """The first six steps of guidance on all steps equal guidance that ends after six steps."""
    whole, part = (Loop(guided=guided) for guided in (range(STEPS), range(6)))
    part.conditions = whole.conditions
    part.transformer.load_state_dict(whole.transformer.state_dict())
    stream = ("transformer", "uncond")
    ours, theirs = (lesa.calibrate(loop, [{}], search=False, progress=False).streams[stream] for loop in (part, whole))
    kept = [*range(6), STEPS]
    torch.testing.assert_close(ours.gram.matrix, theirs.gram.matrix[kept][:, kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.output_errors.power, theirs.output_errors.power[:6], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.output_errors.lengths, theirs.output_errors.lengths[:6, :6], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        products(ours.output_errors), products(theirs.output_errors)[:15, :15], rtol=1e-5, atol=1e-6
    )


def test_image_to_image_is_collected_from_its_first_step():
    made = lesa.collect(Loop(start=3), [{}], progress=False)
    assert made.num_steps == 7
    assert made.shards[0]["transformer", "cond"].shape[:2] == (2, 7)
    assert made.firsts == {("transformer", "cond"): 0}


@for_every_kind
@pytest.mark.parametrize("where", ["memory", "a folder"])
def test_each_stream_is_collected_on_its_own_steps_only(kind, where, tmp_path):
    options, ranges = KINDS[kind]
    loop = Loop(**options)
    out = tmp_path if where == "a folder" else None
    made = lesa.collect(loop, [{}, {}], out=out, progress=False)
    assert made.num_steps == STEPS - loop.start
    assert len(made.streams) == len(ranges)
    for stream in made.streams:
        first, steps = range_of(stream, ranges)
        own = made.of(stream)
        assert (made.firsts[stream], own.num_steps) == (first, steps)
        assert torch.equal(own.times, made.times[first : first + steps + 1])
        assert own.shards[0][stream].isfinite().all()
        gram = lesa.calibrate(loop, [{}], search=False, progress=False).streams[stream].gram
        mine = lesa.GramMatrix(steps)
        for step, feature in enumerate(own.shards[0][stream].unbind(1)):
            mine.update(step, feature)
        torch.testing.assert_close(mine.matrix, gram.matrix, rtol=1e-5, atol=1e-5)
    if out is not None:
        again = lesa.Trajectories.load(tmp_path)
        assert again.firsts == made.firsts
        assert all(torch.equal(again.shards[1][s], made.shards[1][s]) for s in made.streams)


@for_every_kind
def test_predictors_of_streams_of_some_steps_are_fitted_saved_and_enabled(kind, tmp_path):
    options, ranges = KINDS[kind]
    loop = Loop(**options)
    made = lesa.collect(loop, [{}, {}], progress=False)
    plan = lesa.StepPlan(made.num_steps, range(0, made.num_steps, 2))
    config = {"hidden_dim": 4, "history": 4}
    predictors = {}
    for stream in made.streams:
        _, steps = range_of(stream, ranges)
        predictors[stream] = lesa.fit(
            made, plan, lesa.LesaConfig(steps, **config), stream=stream, epochs=(1, 1), progress=False
        )
        predictors[stream].save_pretrained(tmp_path / stream[0] / stream[1])
        predictors[stream] = lesa.LesaPredictor.from_pretrained(tmp_path / stream[0] / stream[1])
        assert predictors[stream].plan == plan
    loop()
    untouched = loop.outputs
    with lesa.enable(loop, lesa.Reuse(), lambda times: lesa.StepPlan(len(times) - 1, [0])):
        loop()
        reused = error(loop, untouched)
    with lesa.enable(loop, predictors, (lambda times: plan) if loop.start else None) as handle:
        loop()
    assert len(handle.records) == len(ranges)
    assert all(record.predicted for record in handle.records)
    assert error(loop, untouched) < reused


def test_the_table_of_a_stream_of_some_steps_equals_that_of_its_own_steps():
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    predictor = lesa.LesaPredictor(lesa.LesaConfig(5, hidden_dim=4)).eval()
    whole = lesa.StepPlan(STEPS, [0, 1, 3, 5, 6, 9])
    for first in (0, 3, 5):
        predictor.schedule = times[first : first + 6]
        plan = whole.starting_at(first)
        own = predictor.table(plan.within(first, 5), times[first : first + 6])
        table = predictor.table(plan, times)
        rows, columns = own.coefficients.shape
        assert torch.equal(table.coefficients[:rows, :columns], own.coefficients)
        assert torch.equal(table.bias[:rows], own.bias)
        assert (table.coefficients[rows:].sum(1) == 1).all()
    predictor.schedule = times[3:9]
    with pytest.raises(ValueError, match="made for 5 steps, the plan has 10"):
        predictor.table(whole, times)  # the predictor starts at step 3
    with pytest.raises(ValueError, match="made for 5 steps, the plan has 10"):
        predictor.table(whole.starting_at(3), times**2)


def test_a_plan_of_some_steps_instead_of_the_whole_schedule_is_refused():
    made = lesa.collect(Loop(guided=range(6)), [{}], progress=False)
    with pytest.raises(ValueError, match="give the plan of the whole schedule"):
        lesa.fit(made, lesa.StepPlan(6, [0, 2, 4]), stream=("transformer", "uncond"), progress=False)
    kan = lesa.LesaConfig(6, hidden_dim=4, latent="kan")
    with pytest.raises(ValueError, match="needs a table, which latent='kan' does not have"):
        lesa.fit(made, lesa.StepPlan(10, [0, 2, 4]), kan, stream=("transformer", "uncond"), progress=False)


def test_a_calibration_from_an_interrupted_generation_is_refused():
    loop = Loop(order=("cond",))
    call = type(loop).__call__

    class Broken(Loop):
        def __call__(self, prompt=None, generator=None):
            calls = []
            forward = self.transformer.forward

            def fail(*args, **kwargs):
                calls.append(1)
                if len(calls) > 4:
                    raise KeyError
                return forward(*args, **kwargs)

            self.transformer.forward = fail
            try:
                call(self)
            except KeyError:
                pass
            finally:
                self.transformer.forward = forward

    with pytest.raises(ValueError, match="only steps"):
        lesa.calibrate(Broken(order=("cond",)), [{}], progress=False)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_one_to_three_steps_are_calibrated(steps):
    from tests.lesa.adapters.diffusers import tiny

    pipeline = tiny.pipeline()
    made = lesa.calibrate(pipeline, [tiny.arguments(steps=steps)], progress=False)
    assert made.num_steps == steps
    with lesa.enable(pipeline, made, full_steps=2) as handle:
        tiny.generate(pipeline, steps=steps)
    assert len(handle.records[0].full) == min(steps, 2)


def test_a_pipeline_whose_output_is_zero_is_calibrated():
    from tests.lesa.adapters.diffusers import tiny

    pipeline = tiny.pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.zero_()
    made = lesa.calibrate(pipeline, [tiny.arguments(steps=6)], progress=False)
    with lesa.enable(pipeline, made, speedup=2) as handle:
        tiny.generate(pipeline, steps=6)
    assert handle.records[0].predicted


def test_a_predictor_for_another_number_of_steps_is_refused_by_enable():
    loop = Loop(order=("cond",))
    predictor = lesa.LesaPredictor(lesa.LesaConfig(5, hidden_dim=4)).eval()
    for own in (None, lesa.StepPlan(5, [0, 2]), lesa.StepPlan(8, [0, 2])):
        predictor.plan = own
        with pytest.raises(ValueError, match="made for 5 steps, the plan has 10"):
            lesa.enable(loop, predictor, lesa.StepPlan(STEPS, [0, 1, 4, 7]))
