"""Budgets given as speedup=, full_steps= and max_error=, and the plans that follow for a schedule."""

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
from tests.lesa.calibrations import TIMES, calibration, products, random_gram

BUDGETS = [{"speedup": 5}, {"speedup": 2.5}, {"full_steps": 10}, {"full_steps": 1}, {"max_error": 1e-12}]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 10])
@pytest.mark.parametrize("requested", BUDGETS, ids=str)
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "uncalibrated"])
def test_a_short_schedule_has_at_least_two_full_steps_whatever_the_budget(steps, requested, calibrated):
    if "max_error" in requested and not calibrated:
        pytest.skip("needs a calibration")
    budget = Budget(**requested, calibration=calibration() if calibrated else None)
    times = torch.linspace(1, 0.0, steps + 1, dtype=torch.float64)
    times[1:-1] = times[1:-1].clamp(min=0.1)
    plan = budget(times)
    assert plan.num_steps == steps
    assert len(plan.full_steps) >= min(steps, 2)
    wanted = requested.get("full_steps", int(steps / requested["speedup"] + 1e-9) if "speedup" in requested else steps)
    assert bool(budget.note(plan)) == (len(plan.full_steps) != wanted or ("max_error" in requested and steps > 2))


def test_a_short_calibrated_generation_runs_two_full_steps_and_warns_once(pipeline, caplog):
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
@pytest.mark.parametrize("requested", [{"speedup": 5}, {"full_steps": 10}], ids=str)
def test_short_uncalibrated_generations_run_at_least_two_full_steps(pipeline, steps, requested):
    with lesa.enable(pipeline, **requested) as handle:
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
def test_invalid_numbers_are_refused_by_the_name_of_the_argument(pipeline, name, value):
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
def test_enable_refuses_wrong_arguments_with_what_to_give(pipeline, arguments, message):
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
def test_numbers_and_objects_of_a_wrong_type_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numpy_numbers_are_accepted():
    assert StepPlan(np.int64(10), np.array([0, 4])) == StepPlan(10, [0, 4])
    assert Taylor(np.int64(1)).order == 1


@pytest.mark.parametrize("count", range(1, 7))
def test_a_plan_does_not_depend_on_earlier_searches(count):
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


def test_a_plan_is_searched_for_times_with_or_without_the_final_zero():
    made = calibration()
    for times in (made.times, made.times[:-1], None, made.times.tolist()):
        assert lesa.optimize_plan(made, 4, times=times) == made.plan(4)
    other = torch.linspace(1, 0, 9, dtype=torch.float64).clamp(min=0.1)
    other[-1] = 0
    assert lesa.optimize_plan(made, 4, times=other).num_steps == 8


def test_a_refined_plan_replaces_the_searched_plan():
    made = calibration()
    made.plans[4] = StepPlan(STEPS, [0, 1, 2, 3])
    assert lesa.optimize_plan(made, 4) == made.plan(4) == made.plans[4]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_calibrations_of_one_to_three_steps_have_plans(steps):
    made = calibration(steps)
    made.search(progress=False)
    assert isinstance(made.curve(), dict)
    for count in range(1, steps + 1):
        plan = made.plan(count)
        assert len(plan.full_steps) == count
        made.forecasters()["transformer", "cond"].table(plan, made.times)


def test_merging_updates_the_output_errors():
    stream = ("transformer", "cond")
    a, b = calibration(seed=0), calibration(seed=1)
    a.requests, b.requests = ["a"], ["b"]
    before = products(a.errors(stream))
    a.merge(b)
    after = products(a.errors(stream))
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, products(OutputErrorGram.from_gram(a.streams[stream].gram)))


def test_calibrations_with_and_without_an_output_head_are_not_merged():
    a, b = calibration(seed=0), calibration(seed=1)
    a.streams["transformer", "cond"].output_errors = OutputErrorGram.from_gram(random_gram())
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"knows the model.s output head"):
            one.merge(other)


def test_zero_features_have_plans_and_finite_tables():
    gram = GramMatrix(6)
    for step in range(6):
        gram.update(step, torch.zeros(8))
    errors = OutputErrorGram.from_gram(gram)
    times = torch.linspace(1, 0, 7)
    for plan in search_plans(errors, times, range(1, 7), progress=False).values():
        table = PathLeastSquares(errors).table(plan, times)
        assert bool(table.coefficients.isfinite().all())


def test_coefficients_of_a_limited_history_are_fitted_to_its_length():
    """The coefficients are fitted to the kept features; they are not those of a full history with some left out."""
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
def test_a_guard_takes_the_expected_error_from_the_calibration(pipeline):
    """Where the prediction errors are larger than the calibrated ones, the guard runs its extra full steps."""
    model = describe_model(pipeline.transformer)
    made = calibration(model=model)
    forecaster = made.forecasters()["transformer", "cond"]
    table = forecaster.table(StepPlan(STEPS, [0, 1, 4, 7]), made.times)
    assert forecaster.expected_error(table).shape == (STEPS,)
    plan = StepPlan(STEPS, [0, 1, 4, 7])
    with lesa.enable(pipeline, made, plan, guard=Guard(extra_steps=1, factor=1e-6)) as handle:
        generate(pipeline)
    assert len(handle.records[0].full) == 5


def test_the_repr_of_a_calibration_is_short():
    made = calibration(model={"transformer": "FluxTransformer2DModel 12345678"})
    assert len(repr(made)) < 200
    assert len(repr(made.forecasters())) < 400


def test_a_calibration_of_another_model_is_refused_as_object_or_folder(pipeline, tmp_path):
    made = calibration(model={"transformer": "FluxTransformer2DModel 12345678"})
    made.save(tmp_path)
    for forecaster in (made, tmp_path, str(tmp_path), made.forecasters()):
        with pytest.raises(ValueError, match="made for transformer FluxTransformer2DModel 12345678"):
            lesa.enable(pipeline, forecaster, speedup=2)


@pytest.mark.parametrize("shift", [1.0, 0.97, 1.03])
def test_times_slightly_beyond_the_calibrated_range_are_resampled(shift):
    """The schedule of a smaller image is shifted less: its last step is at 0.0768 instead of 0.0769."""
    steps = 24
    known = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * known / (1 + (shift - 1) * known)
    expected = random_gram(steps, times=times).matrix
    found = resample(random_gram(steps, times=known), known, times).matrix
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.diagonal().max())
    beyond = times.clone()
    beyond[0] = 1.2
    with pytest.raises(ValueError, match="calibrate on its schedule"):
        resample(random_gram(steps), known, beyond)
