"""What is asked for with speedup=, full_steps= and max_error=, and what a schedule makes of it."""

import logging

import numpy as np
import pytest
import torch

import lesa
from lesa import (
    GramMatrix,
    Guard,
    LeastSquares,
    OutputErrorGram,
    PathLeastSquares,
    Reuse,
    StepPlan,
    Taylor,
)
from lesa.adapters.diffusers.pipeline import describe_model
from lesa.calibration.budget import Budget
from lesa.calibration.planning import search_plans
from lesa.runtime.accelerator import Accelerator
from lesa.runtime.driver import Call
from lesa.statistics.output_errors import path_weights
from lesa.statistics.resampling import resample
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.tiny import STEPS, generate
from tests.lesa.calibrations import TIMES, calibration, random_gram

WISHES = [{"speedup": 5}, {"speedup": 2.5}, {"full_steps": 10}, {"full_steps": 1}, {"max_error": 1e-12}]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 10])
@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "not"])
def test_a_schedule_too_short_for_a_budget_has_the_full_steps_it_needs(steps, wish, calibrated):
    if "max_error" in wish and not calibrated:
        pytest.skip("needs a calibration")
    budget = Budget(**wish, calibration=calibration() if calibrated else None)
    times = torch.linspace(1, 0.0, steps + 1, dtype=torch.float64)
    times[1:-1] = times[1:-1].clamp(min=0.1)
    plan = budget(times)
    assert plan.num_steps == steps
    assert len(plan.full_steps) >= min(steps, 2)
    wanted = wish.get("full_steps", int(steps / wish["speedup"] + 1e-9) if "speedup" in wish else steps)
    assert bool(budget.note(plan)) == (len(plan.full_steps) != wanted or ("max_error" in wish and steps > 2))


def test_eight_steps_on_a_calibration_run_more_than_one_in_full(pipeline, caplog):
    made = calibration(model=describe_model(pipeline.transformer))
    with caplog.at_level(logging.WARNING, "lesa"), lesa.enable(pipeline, made, speedup=5) as handle:
        for _ in range(2):
            generate(pipeline, steps=8)
            assert len(handle.records[0].full) == 2
            assert "too few for speedup=5" in handle.records[0].note
            assert "too few for speedup=5" in handle.summary()
    assert sum("too few for speedup=5" in message for message in caplog.messages) == 1


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("wish", [{"speedup": 5}, {"full_steps": 10}], ids=str)
def test_short_generations_run_in_somebodys_pipeline(pipeline, steps, wish):
    with lesa.enable(pipeline, **wish) as handle:
        generate(pipeline, steps=steps)
    assert len(handle.records[0].full) >= min(steps, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speedup", 0.5),
        ("speedup", 0),
        ("speedup", 100),
        ("speedup", float("nan")),
        ("speedup", True),
        ("speedup", "5"),
        ("full_steps", 0),
        ("full_steps", 2.7),
        ("full_steps", True),
        ("max_error", -1),
        ("max_error", float("nan")),
        ("max_history", 0),
        ("max_history", 1.5),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_the_arguments_name(pipeline, name, value):
    untouched = generate(pipeline)
    plan = {"plan": StepPlan(STEPS, [0, 1])} if name == "max_history" else {}
    made = calibration(model=describe_model(pipeline.transformer))
    for forecaster in (made, Taylor(1)):
        with pytest.raises(ValueError, match=f"^{name}"):
            lesa.enable(pipeline, forecaster, **plan, **{name: value})
    assert torch.equal(generate(pipeline), untouched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Taylor, StepPlan(STEPS, [0])), r"forecaster is the class Taylor; give an instance"),
        ((StepPlan(STEPS, [0]),), "forecaster is a StepPlan; give it as plan="),
        (("taylor", StepPlan(STEPS, [0])), r"lesa.make_forecaster\('taylor'\)"),
        ((3, StepPlan(STEPS, [0])), "forecaster must be"),
        ((Reuse(), [0, 1]), "plan must be a StepPlan"),
    ],
)
def test_wrong_arguments_of_enable_say_what_to_give(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        lesa.enable(pipeline, *arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StepPlan(10, [0, 2.7]), "full_steps"),
        (lambda: StepPlan(10, 3), "full_steps"),
        (lambda: StepPlan(10.0, [0]), "num_steps"),
        (lambda: StepPlan(True, [0]), "num_steps"),
        (lambda: StepPlan.paper(50, 2.5), "interval"),
        (lambda: StepPlan.even(TIMES, 2.5), "num_full"),
        (lambda: Taylor(1.5), "order"),
        (lambda: Taylor(-1), "order"),
        (lambda: lesa.Hermite(True), "order"),
        (lambda: Guard(extra_steps=1.5), "extra_steps"),
        (lambda: Guard(max_error=float("nan")), "max_error"),
        (lambda: LeastSquares(calibration()), "gram must be a GramMatrix, not a Calibration"),
        (lambda: PathLeastSquares(random_gram()), "errors must be an OutputErrorGram, not a GramMatrix"),
        (lambda: PathLeastSquares(OutputErrorGram.from_gram(random_gram()), history=0), "history"),
        (lambda: lesa.refine_plans(None, calibration(), ["a"], [4], candidates=0), "candidates"),
        (lambda: calibration().plan(full_steps=2.7), "full_steps"),
        (lambda: calibration().plan(speedup=0), "speedup"),
    ],
)
def test_numbers_of_the_wrong_kind_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_are_numbers():
    assert StepPlan(np.int64(10), np.array([0, 4])) == StepPlan(10, [0, 4])
    assert Taylor(np.int64(1)).order == 1


@pytest.mark.parametrize("count", range(1, 7))
def test_a_plan_does_not_depend_on_what_was_searched_before(count):
    expected = calibration(6).plan(count)
    searched = calibration(6)
    searched.search(progress=False)
    assert searched.plan(count) == expected
    for before in (1, 3, 6):
        other = calibration(6)
        other.plan(before)
        assert other.plan(count) == expected
    assert lesa.optimize_plan(calibration(6), count) == expected
    times = torch.linspace(1, 0, 7)
    assert lesa.optimize_plan(OutputErrorGram.from_gram(random_gram(6)), count, times=times) == expected


def test_a_plan_is_searched_on_the_calibrated_times_with_or_without_their_end():
    made = calibration()
    for times in (made.times, made.times[:-1], None, made.times.tolist()):
        assert lesa.optimize_plan(made, 4, times=times) == made.plan(4)
    other = torch.linspace(1, 0, 9, dtype=torch.float64).clamp(min=0.1)
    other[-1] = 0
    assert lesa.optimize_plan(made, 4, times=other).num_steps == 8


def test_a_refined_plan_is_the_plan():
    made = calibration()
    made.plans[4] = StepPlan(STEPS, [0, 1, 2, 3])
    assert lesa.optimize_plan(made, 4) == made.plan(4) == made.plans[4]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_calibrations_have_plans(steps):
    made = calibration(steps)
    made.search(progress=False)
    assert isinstance(made.curve(), dict)
    for count in range(1, steps + 1):
        plan = made.plan(count)
        assert len(plan.full_steps) == count
        made.forecasters()["transformer", "cond"].table(plan, made.times)


def test_errors_follow_what_is_merged():
    stream = ("transformer", "cond")
    a, b = calibration(seed=0), calibration(seed=1)
    a.requests, b.requests = ["a"], ["b"]
    before = a.errors(stream).matrix.clone()
    a.merge(b)
    assert not torch.equal(a.errors(stream).matrix, before)
    torch.testing.assert_close(a.errors(stream).matrix, OutputErrorGram.from_gram(a.streams[stream].gram).matrix)


def test_a_calibration_that_lacks_the_end_of_the_model_is_not_merged_into_one_that_has_it():
    a, b = calibration(seed=0), calibration(seed=1)
    a.streams["transformer", "cond"].head = OutputErrorGram.from_gram(random_gram())
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="only one of these calibrations knows the end"):
            one.merge(other)


def test_features_that_are_zero_have_plans_and_tables():
    gram = GramMatrix(6)
    for step in range(6):
        gram.update(step, torch.zeros(8))
    errors = OutputErrorGram.from_gram(gram)
    times = torch.linspace(1, 0, 7)
    for plan in search_plans(errors, times, range(1, 7), progress=False).values():
        table = PathLeastSquares(errors).table(plan, times)
        assert bool(table.coefficients.isfinite().all())


def test_more_steps_than_can_be_calibrated_are_refused_before_room_is_made():
    for make in (lambda: OutputErrorGram.empty(1000), lambda: OutputErrorGram.from_gram(GramMatrix(1000))):
        with pytest.raises(ValueError, match="at most 100 steps, not 1000"):
            make()


def test_a_short_history_is_made_for_its_length():
    """Coefficients that were fitted for the features that are kept, not those of all with the others left out."""
    made, plan = calibration(), StepPlan(STEPS, [0, 1, 2, 4, 6])
    forecaster = made.forecasters()["transformer", "cond"]
    errors = made.errors()
    limited, cut = forecaster.limited(2).table(plan, made.times), forecaster.table(plan, made.times).limited(2)
    assert lesa.sample_error(errors, plan, made.times, forecaster.limited(2)) < float("inf")
    weights = path_weights(plan, made.times, 1.0)
    assert (errors.errors(limited) * weights).sum() < (errors.errors(cut) * weights).sum()
    accelerator, generation, features = Accelerator(forecaster, plan, max_history=2), object(), torch.randn(STEPS, 4)
    features = features.double()
    for step in range(STEPS):
        if accelerator.begin(Call("transformer", "cond", step, made.times, generation, ())):
            row = limited.coefficients[plan.predicted_steps.index(step)]
            torch.testing.assert_close(accelerator.predict("head"), row @ features[list(plan.full_steps)])
        else:
            accelerator.keep("head", features[step])
        accelerator.end(failed=False)


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_guard_on_a_calibration_knows_what_error_to_expect(pipeline):
    """Of features unlike the calibrated ones a guard spends the full steps that it was given."""
    model = describe_model(pipeline.transformer)
    made = calibration(model=model)
    forecaster = made.forecasters()["transformer", "cond"]
    table = forecaster.table(StepPlan(STEPS, [0, 1, 4, 7]), made.times)
    assert forecaster.expected_error(table).shape == (STEPS,)
    plan = StepPlan(STEPS, [0, 1, 4, 7])
    with lesa.enable(pipeline, made, plan, guard=Guard(extra_steps=1, factor=1e-6)) as handle:
        generate(pipeline)
    assert len(handle.records[0].full) == 5


def test_a_calibration_is_shown_in_a_line():
    made = calibration(model={"transformer": "FluxTransformer2DModel 12345678"})
    assert len(repr(made)) < 200
    assert len(repr(made.forecasters())) < 400


def test_a_calibration_of_another_model_is_refused_in_every_form(pipeline, tmp_path):
    made = calibration(model={"transformer": "FluxTransformer2DModel 12345678"})
    made.save(tmp_path)
    for forecaster in (made, tmp_path, str(tmp_path), made.forecasters()):
        with pytest.raises(ValueError, match="made for transformer FluxTransformer2DModel 12345678"):
            lesa.enable(pipeline, forecaster, speedup=2)


@pytest.mark.parametrize("shift", [1.0, 0.97, 1.03])
def test_another_resolution_whose_times_reach_a_little_further_is_served(shift):
    """The schedule of a smaller picture is shifted less: it ends at 0.0768 where the calibrated one ended at 0.0769."""
    steps = 24
    known = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * known / (1 + (shift - 1) * known)
    expected = random_gram(steps, times=times).matrix
    found = resample(random_gram(steps, times=known), known, times).matrix
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.diagonal().max())
    beyond = times.clone()
    beyond[-2] = 0.01
    with pytest.raises(ValueError, match="calibrate on its schedule"):
        resample(random_gram(steps), known, beyond)
