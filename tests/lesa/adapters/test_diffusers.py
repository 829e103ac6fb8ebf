import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lesa
from lesa import LesaConfig, LesaPredictor, LesaWarning, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers import observe
from lesa.adapters.diffusers.endings import KNOWN
from lesa.runtime.observer import Observer
from tests.lesa.adapters import tiny
from tests.lesa.adapters.tiny import STEPS, generate
from tests.lesa.strategies import schedule

PLAN = StepPlan(STEPS, [0, 1, 4, 7])


@pytest.fixture(params=["end known", "blocks handed through"])
def way(request, monkeypatch):
    """Both ways through a predicted step: straight to the end of the model, and through its forward."""
    if request.param == "blocks handed through":
        monkeypatch.delitem(KNOWN, "FluxTransformer2DModel")
    return request.param


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.fixture
def handed_through(monkeypatch):
    """Predicted steps go through the forward, where the head's input can be seen."""
    monkeypatch.delitem(KNOWN, "FluxTransformer2DModel")


class BlockRuns:
    """Counts forwards of anything inside any block, independently of the hooks under test."""

    def __init__(self, transformer):
        self.count = 0
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            for module in block.modules():
                if module is not block:
                    module.register_forward_pre_hook(self._tick)

    def _tick(self, *_):
        self.count += 1


class Oracle:
    """Runs the steps of a plan and answers the others with the features of an earlier generation."""

    def __init__(self, features, plan):
        self.features, self.plan, self.call = features, plan, None

    def begin(self, call):
        self.call = call
        return not self.plan.is_full(call.step)

    def keep(self, head, feature):
        pass

    def predict(self, head):
        return self.features[self.call.branch, self.call.step].clone()

    def coming(self, head):
        return None

    def end(self, *, failed):
        assert not failed

    def reset(self):
        pass


def record(pipeline, **options):
    """The features of a generation by (branch, step), and its result."""
    features = {}
    with observe(pipeline, Observer(lambda call, f: features.__setitem__((call.branch, call.step), f.clone()))):
        result = generate(pipeline, **options)
    return features, result


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_true_features_the_result_is_the_untouched_one_and_no_block_runs(pipeline, way, guidance):
    untouched = generate(pipeline, guidance=guidance)
    features, watched = record(pipeline, guidance=guidance)
    assert torch.equal(untouched, watched)
    runs = BlockRuns(pipeline.transformer)
    generate(pipeline, guidance=guidance)
    every_step, runs.count = runs.count, 0
    with observe(pipeline, Oracle(features, PLAN)):
        result = generate(pipeline, guidance=guidance)
    if way == "blocks handed through":
        assert torch.equal(result, untouched)
    else:  # the fused end adds in another order
        torch.testing.assert_close(result, untouched, rtol=1e-5, atol=1e-5)
    assert runs.count == every_step * len(PLAN.full_steps) / STEPS


def test_guidance_branches_have_names_and_features_of_their_own(pipeline):
    features, _ = record(pipeline, guidance=3.0)
    assert {branch for branch, _ in features} == {"cond", "uncond"}
    assert not torch.equal(features["cond", 0], features["uncond", 0])


def test_a_pipeline_that_names_no_branches_gets_them_by_order(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.transformer), "cache_context", lambda self, name: nullcontext())
    features, _ = record(pipeline, guidance=3.0)
    assert set(features) == {(f"call{i}", step) for i in (0, 1) for step in range(STEPS)}
    with lesa.enable(
        pipeline, {("transformer", "call0"): Taylor(1), ("transformer", "call1"): Reuse()}, PLAN
    ) as handle:
        generate(pipeline, guidance=3.0)
    assert [(r.branch, r.full) for r in handle.records] == [(f"call{i}", list(PLAN.full_steps)) for i in (0, 1)]


def test_a_predictor_with_a_kan_on_the_features_samples_its_closed_loop(pipeline, handed_through):
    predictor = LesaPredictor(LesaConfig(STEPS, hidden_dim=8, latent="kan"))
    for layer in predictor.latent:
        torch.nn.init.normal_(layer.spline_weight, std=0.1)
    seen, norm = [], pipeline.transformer.norm_out
    with lesa.enable(pipeline, predictor, PLAN) as handle, torch.no_grad():
        norm.forward, forward = lambda x, *a: (seen.append(x.clone()), forward(x, *a))[1], norm.forward
        generate(pipeline)
        del norm.forward
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
        for step in PLAN.predicted_steps:
            times = pipeline.scheduler.sigmas
            expected = predictor(torch.stack(seen[:step]), times, times[step])
            torch.testing.assert_close(seen[step], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(2), "lesa"])
def test_predicted_features_are_those_of_the_table(pipeline, handed_through, forecaster):
    if forecaster == "lesa":
        forecaster = LesaPredictor(LesaConfig(STEPS, hidden_dim=8))
    seen = []
    norm = pipeline.transformer.norm_out
    with lesa.enable(pipeline, forecaster, PLAN):
        norm.forward, forward = lambda x, *a: (seen.append(x.clone()), forward(x, *a))[1], norm.forward
        generate(pipeline)
        del norm.forward
        table = forecaster.table(PLAN, pipeline.scheduler.sigmas)
    full = torch.stack([seen[step] for step in PLAN.full_steps]).double()
    for row, bias, step in zip(table.coefficients, table.bias, PLAN.predicted_steps, strict=True):
        expected = torch.einsum("j,j...->...", row, full) + bias
        torch.testing.assert_close(seen[step].double(), expected, rtol=1e-4, atol=1e-5)


def test_both_ways_give_the_same_images(pipeline, monkeypatch):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        straight = generate(pipeline, guidance=3.0)
    monkeypatch.delitem(KNOWN, "FluxTransformer2DModel")
    with lesa.enable(pipeline, Taylor(1), PLAN):
        torch.testing.assert_close(generate(pipeline, guidance=3.0), straight)


def test_disable_restores_everything(pipeline, way):
    untouched, transformer = generate(pipeline), pipeline.transformer
    state, kind = transformer.state_dict(), type(transformer)
    handle = lesa.enable(pipeline, Reuse(), PLAN)
    assert isinstance(transformer, kind)
    assert transformer.state_dict().keys() == state.keys()
    assert not torch.equal(generate(pipeline), untouched)
    lesa.disable(pipeline)
    assert type(transformer) is kind
    assert torch.equal(generate(pipeline), untouched)
    registries = [m._diffusers_hook for m in transformer.modules() if hasattr(m, "_diffusers_hook")]
    assert not any(registry.hooks for registry in registries)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in transformer.modules())
    lesa.disable(pipeline)
    handle.disable()


def test_a_second_generation_starts_clean(pipeline, way):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        first = generate(pipeline)
        generate(pipeline, seed=5)
        assert torch.equal(generate(pipeline), first)
        assert [(r.full, r.predicted) for r in handle.records] == [(list(PLAN.full_steps), list(PLAN.predicted_steps))]


def test_batch_resolution_and_guidance_may_change_between_generations(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        for options in ({}, {"batch": 3}, {"size": 96}, {"guidance": 3.0}, {}):
            result = generate(pipeline, **options)
            assert bool(result.isfinite().all())
            assert all(r.predicted == list(PLAN.predicted_steps) for r in handle.records)


def test_another_step_count_is_an_error_for_a_fixed_plan_and_fine_for_a_function(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN), pytest.raises(ValueError, match="this generation has 12"):
        generate(pipeline, steps=12)
    with lesa.enable(pipeline, Taylor(1), lambda times: StepPlan.paper(len(times) - 1, 4)) as handle:
        for steps in (12, 20):
            generate(pipeline, steps=steps)
            assert tuple(handle.records[0].full) == StepPlan.paper(steps, 4).full_steps


def test_an_exception_half_way_leaves_nothing_behind(pipeline, way):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = generate(pipeline)

        def fail(pipe, step, time, state):
            if step == 4:
                raise RuntimeError("stop here")
            return {}

        with pytest.raises(RuntimeError, match="stop here"):
            pipeline(**tiny.arguments(seed=9), callback_on_step_end=fail)
        assert torch.equal(generate(pipeline), expected)


def test_an_exception_inside_the_transformer_leaves_nothing_behind(pipeline, way):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = generate(pipeline)
        with (
            monkeypatched_failure(pipeline.transformer.time_text_embed.timestep_embedder, after=4),
            pytest.raises(RuntimeError, match="out of"),
        ):
            generate(pipeline, seed=9)
        assert torch.equal(generate(pipeline), expected)


class monkeypatched_failure:  # noqa: N801 (reads as a verb at its use)
    """A module whose n-th call fails."""

    def __init__(self, module, after):
        self.module, self.left = module, after

    def __enter__(self):
        self.handle = self.module.register_forward_pre_hook(self._maybe_fail)

    def _maybe_fail(self, *_):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")

    def __exit__(self, *_):
        self.handle.remove()


def test_a_batch_that_shrinks_half_way_runs_in_full_from_there(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for step in range(STEPS):
            call_at(pipeline.transformer, times[step], batch=2 if step < 5 else 1)
    # 5 and 6 would have been predicted from features of two samples; from step 7 on there is one of the new size, and
    # Taylor needs two
    assert handle.records[0].predicted == [2, 3]


def call_at(transformer, time, batch=2, **changes):
    """One call of a bare transformer."""
    inputs = {
        "hidden_states": torch.randn(batch, 16, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 8),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": time.float().expand(batch),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return transformer(**inputs | changes).sample


def test_gradients_run_the_transformer_untouched(pipeline):
    runs = BlockRuns(pipeline.transformer)
    with lesa.enable(pipeline, Reuse(), PLAN):
        generate(pipeline)
        runs.count = 0
        x = torch.randn(2, 16, 4, requires_grad=True)
        call_at(pipeline.transformer, torch.tensor(0.5), hidden_states=x).sum().backward()
    assert runs.count > 0
    assert bool(x.grad.abs().sum() > 0)


def test_kept_bytes_are_those_of_the_features_that_are_needed_at_once(pipeline):
    feature = 2 * 16 * 32 * 4  # batch x tokens x channels x float32
    for forecaster, features in ((Reuse(), 1), (Taylor(1), 2), (Taylor(2), 3)):
        with lesa.enable(pipeline, forecaster, PLAN) as handle:
            generate(pipeline)
        assert handle.records[0].kept_bytes == features * feature
    assert "4 full and 6 predicted steps, 2.50x ideal" in handle.summary()


def test_a_handle_without_a_generation_says_so(pipeline):
    with lesa.enable(pipeline, Reuse(), PLAN) as handle:
        assert handle.summary() == "no generation yet"


def test_two_pipelines_in_two_threads_do_not_meet():
    pipelines = [tiny.pipeline(seed) for seed in (0, 1)]
    alone = []
    for pipe in pipelines:
        with lesa.enable(pipe, Taylor(1), PLAN):
            alone.append(generate(pipe))
    together = [None, None]

    def work(i):
        together[i] = [generate(pipelines[i]) for _ in range(3)]

    with lesa.enable(pipelines[0], Taylor(1), PLAN), lesa.enable(pipelines[1], Taylor(1), PLAN):
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)


def test_a_bare_transformer_takes_the_times_of_its_schedule(pipeline):
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


def test_a_table_serves_its_own_schedule_only(pipeline):
    generate(pipeline)
    table = Taylor(1).table(PLAN, pipeline.scheduler.sigmas)
    with lesa.enable(pipeline, table):
        generate(pipeline)
        with pytest.raises(ValueError, match="another schedule"):
            pipeline(**tiny.arguments(), sigmas=[1 - 0.09 * i for i in range(STEPS)])
    with pytest.raises(ValueError, match="made for the plan"):
        lesa.enable(pipeline, table, StepPlan(STEPS, [0, 5]))


def test_a_generation_that_starts_part_way_takes_the_rest_of_the_plan(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for time in times[3:-1]:
            call_at(pipeline.transformer, time)
    assert (handle.records[0].full, handle.records[0].predicted) == ([3, 4, 7], [5, 6, 8, 9])


def test_a_generation_that_predicts_nothing_is_reported(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        pipeline.transformer.norm_out._forward_pre_hooks.clear()  # as if the blocks never reached the head
        with pytest.warns(LesaWarning, match="no step of transformer .* was predicted"):
            generate(pipeline)


def test_what_cannot_work_says_so_at_once_and_changes_nothing(pipeline):
    transformer = pipeline.transformer
    with pytest.raises(ValueError, match="which steps are full"):
        lesa.enable(pipeline, Reuse())
    with pytest.raises(ValueError, match="StepPlan or a function"):
        lesa.enable(pipeline, Reuse(), [0, 5])
    with pytest.raises(ValueError, match="made for 20 steps"):
        lesa.enable(pipeline, LesaPredictor(LesaConfig(20, hidden_dim=4)), PLAN)
    with pytest.raises(ValueError, match="no list of blocks"):
        lesa.enable(WithoutBlocks(), Reuse(), PLAN)
    with pytest.raises(ValueError, match="no final norm"):
        lesa.enable(nn.Linear(2, 2), Reuse(), PLAN)
    with pytest.raises(ValueError, match="has no transformer"):
        lesa.enable(object(), Reuse(), PLAN)
    with pytest.raises(ValueError, match="from its scheduler"):
        lesa.enable(pipeline, Reuse(), PLAN, times=[1.0, 0.5])
    with lesa.enable(pipeline, Reuse(), PLAN), pytest.raises(ValueError, match="already enabled on transformer"):
        lesa.enable(pipeline, Reuse(), PLAN)
    with (
        lesa.enable(pipeline, {("transformer", "other"): Reuse()}, PLAN),
        pytest.raises(ValueError, match=r"no forecaster for \('transformer', 'cond'\)"),
    ):
        generate(pipeline)
    assert type(transformer).__call__ is nn.Module.__call__


class WithoutBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_out = nn.LayerNorm(4)

    def forward(self, hidden_states, timestep):
        return self.norm_out(hidden_states)


def test_a_cache_of_diffusers_is_not_mixed_with_ours(pipeline):
    from diffusers import FirstBlockCacheConfig

    pipeline.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache"):
        lesa.enable(pipeline, Reuse(), PLAN)
    pipeline.transformer.disable_cache()
    lesa.enable(pipeline, Reuse(), PLAN).disable()


def test_an_enabled_transformer_is_saved_but_not_copied_or_pickled(pipeline, tmp_path):
    transformer = pipeline.transformer
    with lesa.enable(pipeline, Reuse(), PLAN):
        transformer.save_pretrained(tmp_path)
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="disable it first"):
                attempt(transformer)
    loaded = type(transformer).from_pretrained(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in transformer.state_dict().items())
    copy.deepcopy(transformer)


def test_a_table_is_made_once_for_each_schedule(pipeline):
    class Counting(Reuse):
        made = 0

        def table(self, plan, times):
            Counting.made += 1
            return super().table(plan, times)

    with lesa.enable(pipeline, Counting(), PLAN):
        for _ in range(3):
            generate(pipeline)
    assert Counting.made == 1
