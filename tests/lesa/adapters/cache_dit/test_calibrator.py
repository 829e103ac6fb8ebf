"""The calibrators of lesa inside cache-dit itself, on the tiny FLUX."""

import copy
import dataclasses
import types
from contextlib import contextmanager

import cache_dit
import pytest
import torch
from cache_dit.caching.cache_contexts import cache_context
from cache_dit.caching.cache_contexts.calibrators import CalibratorBase
from hypothesis import given

from lesa import L2P, FoCa, Hermite, LeastSquares, LesaConfig, LesaPredictor, Reuse, StepPlan, Taylor
from lesa.adapters.cache_dit import ForecasterCalibrator, ForecasterConfig, GramConfig, compat, steps_mask
from lesa.adapters.cache_dit.calibrator import GrowingHistory
from lesa.adapters.cache_dit.tables import Tables
from tests.lesa.adapters.diffusers.tiny import STEPS, arguments, generate, pipeline
from tests.lesa.strategies import plans, schedule

PLAN = StepPlan.paper(STEPS, interval=3)


@contextmanager
def cached(calibrator, plan=PLAN, *, policy="static", guidance=1.0, **options):
    """A pipeline with cache-dit enabled, and a list with one entry for each run of its last block."""
    made, ran = pipeline(), []
    made.transformer.single_transformer_blocks[-1].register_forward_pre_hook(lambda *_: ran.append(None))
    cache_dit.enable_cache(
        made,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            steps_computation_mask=None if plan is None else steps_mask(plan),
            steps_computation_policy=policy,
            enable_separate_cfg=guidance > 1,
            **options,
        ),
        calibrator_config=calibrator(made),
    )
    try:
        yield made, ran
    finally:
        cache_dit.disable_cache(made)


def image(calibrator, plan=PLAN, *, guidance=1.0, **options):
    """The image of a pipeline with cache-dit, whose full steps are checked."""
    with cached(calibrator, plan, guidance=guidance, **options) as (made, ran):
        result = generate(made, guidance=guidance)
        assert len(ran) == len(plan.full_steps) * (1 + (guidance > 1))
    return result


@pytest.mark.parametrize("cache_type", ["residual", "hidden_states"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_taylor_of_order_1_equals_the_taylorseer_of_cache_dit(cache_type, guidance):
    def theirs(_):
        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1, calibrator_cache_type=cache_type)

    def ours(made):
        return ForecasterConfig(Taylor(1), made, calibrator_cache_type=cache_type)

    expected = image(theirs, guidance=guidance)
    torch.testing.assert_close(image(ours, guidance=guidance), expected, rtol=1e-4, atol=1e-4)
    reused = image(lambda made: ForecasterConfig(Reuse(), made, calibrator_cache_type=cache_type), guidance=guidance)
    assert (reused - expected).abs().max() > 1e-3


def test_reuse_equals_cache_dit_without_a_calibrator():
    assert torch.equal(image(lambda made: ForecasterConfig(Reuse(), made)), image(lambda _: None))


def test_a_predicted_step_runs_only_the_first_block():
    with cached(lambda made: ForecasterConfig(Taylor(2), made)) as (made, ran):
        first = []
        made.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: first.append(None))
        generate(made)
        assert (len(first), len(ran)) == (STEPS, len(PLAN.full_steps))


FORECASTERS = [
    Reuse(),
    Taylor(2),
    Taylor(1, "time"),
    Hermite(2),
    FoCa(),
    L2P(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)) / 4),
    LesaPredictor(LesaConfig(12, hidden_dim=4)),
]


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=lambda f: type(f).__name__)
@given(plan=plans(max_steps=12))
def test_a_stream_predicts_by_the_table_of_the_whole_plan(forecaster, plan):
    plan = StepPlan(12, plan.full_steps)
    features, times = torch.randn(12, 2, 3), schedule(12)
    history, table = GrowingHistory(Tables(forecaster, times), times), forecaster.table(plan, times)
    for step in range(12):
        if plan.is_full(step):
            history.keep(step, features[step])
            continue
        row = plan.predicted_steps.index(step)
        expected = table.coefficients[row] @ features[list(plan.full_steps)].flatten(1).double() + table.bias[row]
        torch.testing.assert_close(history.predict(step).flatten().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_feature_whose_coefficient_is_zero_for_some_steps_is_kept():
    plan = StepPlan.paper(
        50, interval=7
    )  # FoCa's coefficient of step 9 is zero after step 16 and nonzero again after step 23
    history, line = GrowingHistory(Tables(FoCa(), 50), schedule(50)), torch.arange(50.0)
    for step in range(50):
        if plan.is_full(step):
            history.keep(step, line[step : step + 1])
        else:
            torch.testing.assert_close(history.predict(step), line[step : step + 1])


def test_a_stream_keeps_only_the_features_that_its_forecaster_uses():
    feature = torch.randn(4, 8)
    for forecaster, limit, kept in ((Taylor(1), None, 2), (Taylor(2), None, 3), (FoCa(), None, 4), (FoCa(), 2, 2)):
        history = GrowingHistory(Tables(forecaster, 20, limit), schedule(20))
        for step in range(0, 20, 2):
            history.keep(step, feature)
            history.predict(step + 1)
        assert history.nbytes == kept * feature.nbytes
    history = GrowingHistory(Tables(L2P(torch.eye(20)), 20), schedule(20))
    for step in range(9):
        history.keep(step, feature)
    assert history.nbytes == 16 * feature.nbytes


def test_full_steps_chosen_by_cache_dit_during_a_generation_are_supported():
    options = {"residual_diff_threshold": 0.9, "max_warmup_steps": 3, "max_continuous_cached_steps": 2}
    with cached(lambda made: ForecasterConfig(Taylor(1, "time"), made), None, policy="dynamic", **options) as (
        made,
        ran,
    ):
        results = [made(**arguments(steps=steps, batch=batch)).images for steps, batch in ((8, 2), (12, 1), (8, 2))]
    assert len(ran) == 4 + 6 + 4
    assert torch.equal(results[0], results[2])
    assert results[1].shape[0] == 1


def test_calibrators_share_their_tables_when_a_config_is_copied():
    config = ForecasterConfig(Taylor(1), 50)
    assert copy.deepcopy(config).to_kwargs()["tables"] is config.to_kwargs()["tables"]
    assert dataclasses.asdict(config)["calibrator_kwargs"]["tables"] is config.to_kwargs()["tables"]


def test_a_table_is_computed_once_for_each_full_step_of_a_schedule():
    class Counting(Reuse):
        made = 0

        def table(self, plan, times):
            Counting.made += 1
            return super().table(plan, times)

    with cached(lambda made: ForecasterConfig(Counting(), made)) as (made, _):
        for _ in range(2):
            generate(made)
    assert Counting.made == len(PLAN.full_steps)


def test_the_calibrators_of_cache_dit_itself_still_work():
    compat.install("lesa", ForecasterCalibrator)
    compat.install("lesa", ForecasterCalibrator)
    made = cache_context.Calibrator(cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2))
    assert type(made).__name__ == "TaylorSeerCalibrator"
    with pytest.raises(AssertionError, match="not supported"):
        cache_context.Calibrator(cache_dit.CalibratorConfig(enable_calibrator=True, calibrator_type="none"))
    assert ForecasterConfig(Taylor(1), 50).strify() == "lesa.Taylor(order=1, variable='step')"


class OldBase:
    """A base class of calibrators with an older interface."""

    def reset_cache(self): ...

    def update(self): ...


def changed_module(**names):
    """The context module of cache-dit with other contents."""
    return types.SimpleNamespace(**{"Calibrator": object, "CachedContext": cache_context.CachedContext} | names)


@pytest.mark.parametrize(
    ("module", "base", "config", "match"),
    [
        (changed_module(Calibrator=None), CalibratorBase, cache_dit.CalibratorConfig, "no factory"),
        (changed_module(CachedContext=object), CalibratorBase, cache_dit.CalibratorConfig, "in another way"),
        (changed_module(), OldBase, cache_dit.CalibratorConfig, "no mark_step_begin, approximate"),
        (
            changed_module(),
            CalibratorBase,
            dataclasses.make_dataclass("Config", ["calibrator_type"]),
            "no calibrator_cache",
        ),
    ],
)
def test_an_incompatible_cache_dit_raises_an_error_with_what_to_install(module, base, config, match):
    with pytest.raises(
        ImportError, match=rf"cache-dit {cache_dit.__version__}.*{match}.*pip install 'cache-dit==1.5.3'"
    ):
        compat.check(module, base, config)


def test_invalid_settings_and_too_many_steps_raise_an_error():
    with pytest.raises(ValueError, match=r"needs the times.*give the pipeline"):
        ForecasterConfig(Taylor(1, "time"), 50)
    with pytest.raises(ValueError, match="max_history must be at least 1"):
        ForecasterConfig(Taylor(1), 50, max_history=0)
    with pytest.raises(ValueError, match="'residual' or 'hidden_states'"):
        ForecasterConfig(Taylor(1), 50, calibrator_cache_type="output")

    calibrator = ForecasterCalibrator(Tables(Taylor(1), 2))
    for _ in range(2):
        calibrator.mark_step_begin()
    with pytest.raises(ValueError, match=r"step 2 on a schedule of 2 steps.*num_inference_steps=2"):
        calibrator.mark_step_begin()


def test_a_generation_that_starts_part_way_uses_the_times_of_its_steps():
    made = pipeline()
    made.scheduler.set_timesteps(6, mu=1.0)
    made.scheduler.set_begin_index(2)
    calibrator, times = ForecasterCalibrator(Tables(Taylor(1, "time"), made)), made.scheduler.sigmas
    for step in (2, 3, 4):
        calibrator.mark_step_begin()
        if step < 4:
            calibrator.update(3 * times[step : step + 1], name="line")
    torch.testing.assert_close(calibrator.approximate(name="line"), 3 * times[4:5])


def test_a_stream_that_starts_at_a_later_step_is_predicted():
    calibrator = ForecasterCalibrator(Tables(Taylor(1), 4))
    calibrator.mark_step_begin()
    calibrator.mark_step_begin()
    calibrator.update(torch.ones(2), name="late")
    calibrator.mark_step_begin()
    assert calibrator.approximate(name="late").tolist() == [1, 1]


def test_a_reset_calibrator_starts_a_new_generation():
    calibrator = ForecasterCalibrator(Tables(Taylor(1), 4))
    for value in (1.0, 5.0):
        calibrator.reset_cache()
        assert calibrator.nbytes == 0
        calibrator.mark_step_begin()
        calibrator.update(torch.full((2,), value), name="a")
        calibrator.mark_step_begin()
        assert calibrator.approximate(name="a").tolist() == [value, value]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_least_squares_fitted_in_cache_dit_has_the_lowest_error(guidance):
    recording, every = GramConfig(STEPS), StepPlan(STEPS, range(STEPS))
    full = image(lambda _: recording, every, guidance=guidance)
    assert recording.gram.count > 0
    errors = []
    for forecaster in (LeastSquares(recording.gram), Reuse(), Taylor(2)):
        error = recording.gram.table_error(forecaster.table(PLAN, schedule(STEPS))).sum()
        made = image(lambda made, forecaster=forecaster: ForecasterConfig(forecaster, made), guidance=guidance)
        errors.append((error, (made - full).norm()))
    assert errors[0] == min(errors)
    assert errors[0][1] == min(distance for _, distance in errors)


def test_measuring_features_with_predicted_steps_raises_an_error():
    with (
        cached(lambda _: GramConfig(STEPS)) as (made, _),
        pytest.raises(RuntimeError, match=r"steps_computation_mask=\[1\] \* 10"),
    ):
        generate(made)
