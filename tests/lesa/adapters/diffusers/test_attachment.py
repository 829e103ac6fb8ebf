"""Enabling and disabling: repeated and interrupted generations, exceptions, threads, and saving a transformer."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

import lesa
from lesa import Reuse, StepPlan, Taylor
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.probes import PLAN, BlockRuns, call_at
from tests.lesa.adapters.diffusers.tiny import STEPS, generate
from tests.lesa.strategies import schedule


def test_a_second_generation_does_not_depend_on_the_first(pipeline, predicted_path):
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


def test_another_number_of_steps_needs_a_function_instead_of_a_fixed_plan(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN), pytest.raises(ValueError, match="this generation has 12"):
        generate(pipeline, steps=12)
    with lesa.enable(pipeline, Taylor(1), lambda times: StepPlan.paper(len(times) - 1, 4)) as handle:
        for steps in (12, 20):
            generate(pipeline, steps=steps)
            assert tuple(handle.records[0].full) == StepPlan.paper(steps, 4).full_steps


def kept(handle):
    """The branches whose features are kept at the moment."""
    return [branch for _, branch in handle.going_on]


def test_an_exception_in_a_callback_does_not_change_the_next_generation(pipeline, predicted_path):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        expected = generate(pipeline)

        def fail(pipe, step, time, state):
            if step == 4:
                raise RuntimeError("stop here")
            return {}

        with pytest.raises(RuntimeError, match="stop here"):
            pipeline(**tiny.arguments(seed=9, guidance=3.0), callback_on_step_end=fail)
        assert torch.equal(generate(pipeline), expected)
        assert kept(handle) == []  # also not of the branch that only the failed generation had


def test_an_exception_in_the_transformer_frees_all_features(pipeline, predicted_path):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        expected = generate(pipeline)
        with (
            FailingModule(pipeline.transformer.time_text_embed.timestep_embedder, after=5),
            pytest.raises(RuntimeError, match="out of"),
        ):
            generate(pipeline, seed=9, guidance=3.0)
        assert kept(handle) == []  # freed at once: the exception may be an out-of-memory error
        assert torch.equal(generate(pipeline), expected)


def test_a_strict_handle_does_not_hide_an_exception(pipeline):
    def fail(pipe, step, time, state):
        raise RuntimeError("stop here")

    with (
        pytest.raises(RuntimeError, match="stop here"),
        lesa.enable(pipeline, Taylor(1), PLAN, strict=True),
    ):
        pipeline(**tiny.arguments(), callback_on_step_end=fail)


def test_an_interrupted_generation_gives_no_warning_and_frees_all_features(pipeline, predicted_path):
    def interrupt(pipe, step, time, state):
        pipe._interrupt = step == 2
        return {}

    with lesa.enable(pipeline, Taylor(1), PLAN, strict=True) as handle:
        expected = generate(pipeline)
        pipeline(**tiny.arguments(seed=9), callback_on_step_end=interrupt)
        assert (handle.records[0].full, handle.records[0].predicted) == ([0, 1], [2])
        assert kept(handle) == []
        assert torch.equal(generate(pipeline), expected)


def test_lesa_may_be_disabled_and_enabled_during_a_generation(pipeline, predicted_path):
    untouched, handles = generate(pipeline), []

    def change(pipe, step, time, state):
        if step == 2:
            lesa.disable(pipe)
        if step == 5:
            handles.append(lesa.enable(pipe, Taylor(1), PLAN))
        return {}

    lesa.enable(pipeline, Taylor(1), PLAN)
    pipeline(**tiny.arguments(), callback_on_step_end=change)
    assert (handles[0].records[0].full, handles[0].records[0].predicted) == ([6, 7], [8, 9])
    lesa.disable(pipeline)
    assert torch.equal(generate(pipeline), untouched)


def test_prompts_and_features_are_freed_after_a_generation(pipeline, predicted_path):
    given = tiny.arguments()
    prompt = weakref.ref(given["prompt_embeds"])
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        pipeline(**given)
        del given
        gc.collect()
        assert prompt() is None
        assert kept(handle) == []


class FailingModule:
    """Inside this context a module raises an error after some calls."""

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


def test_a_batch_that_shrinks_during_a_generation_runs_a_full_step(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for step in range(STEPS):
            call_at(pipeline.transformer, times[step], batch=2 if step < 5 else 1)
    # the kept features are of two samples, so step 5 runs in full; after it the plan continues as after a first step
    assert handle.records[0].full == [0, 1, 4, 5, 7]
    assert handle.records[0].predicted == [2, 3, 6, 8, 9]


def test_the_transformer_runs_without_lesa_if_gradients_are_required(pipeline):
    runs = BlockRuns(pipeline.transformer)
    with lesa.enable(pipeline, Reuse(), PLAN):
        generate(pipeline)
        runs.count = 0
        x = torch.randn(2, 16, 4, requires_grad=True)
        call_at(pipeline.transformer, torch.tensor(0.5), hidden_states=x).sum().backward()
    assert runs.count > 0
    assert bool(x.grad.abs().sum() > 0)


def test_two_pipelines_in_two_threads_do_not_affect_each_other():
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


def test_an_enabled_transformer_can_be_saved_but_not_copied_or_pickled(pipeline, tmp_path):
    transformer = pipeline.transformer
    with lesa.enable(pipeline, Reuse(), PLAN):
        transformer.save_pretrained(tmp_path)
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="disable it first"):
                attempt(transformer)
        with pytest.raises(TypeError, match="disable it first"):
            copy.deepcopy(pipeline)
    loaded = type(transformer).from_pretrained(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in transformer.state_dict().items())
    copy.deepcopy(transformer)


def test_disable_restores_the_pipeline(pipeline, predicted_path):
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
