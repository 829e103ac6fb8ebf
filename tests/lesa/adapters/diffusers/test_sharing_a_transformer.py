"""One transformer with several users: pipelines with their own schedulers, threads, and nested calls."""

import threading

import diffusers
import pytest
import torch
from torch import nn

import lesa
from lesa import Reuse, StepPlan, Taylor
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.probes import PLAN, call_at
from tests.lesa.adapters.diffusers.tiny import STEPS, arguments, generate
from tests.lesa.strategies import schedule


def request_pipeline(pipeline):
    """A pipeline for one request: the models of another pipeline, and its own scheduler."""
    made = diffusers.FluxPipeline(**pipeline.components)
    made.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def run_in_threads(*works):
    """Run functions in a thread each, and raise the first error."""
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("used_before", [True, False])
def test_a_request_pipeline_is_accelerated_with_its_own_scheduler(pipeline, predicted_path, used_before):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        expected = generate(pipeline)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        if used_before:
            generate(pipeline, seed=3)
        for _ in range(2):
            assert torch.equal(generate(request_pipeline(pipeline)), expected)
            assert handle.records[0].predicted == list(PLAN.predicted_steps)
    assert handle.going_on == []


def test_an_error_about_a_schedule_of_another_length_names_its_pipeline(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN), pytest.raises(ValueError, match="scheduler of the pipeline"):
        generate(pipeline, steps=12)


def test_a_generation_inside_a_callback_does_not_change_the_outer_one(pipeline, predicted_path):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        outer, inner = generate(pipeline), generate(pipeline, seed=5)
        made = []

        def nested(pipe, step, time, state):
            if step == 4:
                made.append(generate(request_pipeline(pipeline), seed=5))
            return {}

        result = pipeline(**arguments(), callback_on_step_end=nested).images
        assert torch.equal(made[0], inner)
        assert torch.equal(result, outer)
        assert handle.going_on == []


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_two_threads_with_a_pipeline_each_share_a_transformer(pipeline, predicted_path, guidance):
    seeds = (0, 5)
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = [generate(pipeline, seed=seed, guidance=guidance) for seed in seeds]
        results = {seed: [] for seed in seeds}

        def work(seed):
            mine = request_pipeline(pipeline)
            results[seed].extend(generate(mine, seed=seed, guidance=guidance) for _ in range(4))

        run_in_threads(*(lambda seed=seed: work(seed) for seed in seeds))
    for seed, image in zip(seeds, expected, strict=True):
        assert all(torch.equal(result, image) for result in results[seed])


def taking_turns(count):
    """A function that waits for all threads, so that their calls alternate."""
    barrier = threading.Barrier(count)
    return barrier.wait


def test_threads_that_call_one_transformer_have_separate_generations(pipeline, predicted_path):
    times, transformer = schedule(STEPS), pipeline.transformer
    prompts = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    latents = torch.randn(2, 16, 4)

    @torch.no_grad()
    def sample(prompt, turn=lambda: None):
        outputs = []
        for time in times[:-1]:
            turn()
            outputs.append(call_at(transformer, time, hidden_states=latents, encoder_hidden_states=prompt))
        return outputs

    with lesa.enable(transformer, Taylor(1), PLAN, times=times):
        expected = [sample(prompt) for prompt in prompts]
        results, turn = [None, None], taking_turns(2)

        def work(i):
            results[i] = sample(prompts[i], turn)

        run_in_threads(lambda: work(0), lambda: work(1))
    for made, image in zip(results, expected, strict=True):
        assert all(map(torch.equal, made, image))


class Denoiser(nn.Module):
    """A module that is not from diffusers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x, shift):
        for block in self.blocks:
            x = x + block(x + shift)
        return self.norm(x)


def test_threads_that_step_through_one_module_have_separate_generations():
    torch.manual_seed(0)
    module = Denoiser().requires_grad_(False)
    x = torch.randn(2, 3, 4)

    def sample(steps, shift, turn=lambda: None):
        outputs = []
        for step in range(STEPS):
            turn()
            with steps.step(step):
                outputs.append(module(x, shift + step))
        return outputs

    with lesa.enable_module(module, Taylor(1), PLAN, blocks=module.blocks, head=module.norm) as steps:
        expected = [sample(steps, shift) for shift in (0.0, 2.0)]
        results, turn = [None, None], taking_turns(2)

        def work(i):
            results[i] = sample(steps, 2.0 * i, turn)

        run_in_threads(lambda: work(0), lambda: work(1))
    for made, image in zip(results, expected, strict=True):
        assert all(map(torch.equal, made, image))


def test_a_pipeline_may_be_used_by_several_threads_one_after_the_other(pipeline):
    plan = StepPlan(STEPS, [0, 3, 6])
    with lesa.enable(pipeline, Reuse(), plan) as handle:
        expected, results = generate(pipeline), []
        for _ in range(2):
            run_in_threads(lambda: results.append(generate(pipeline)))
        assert all(torch.equal(result, expected) for result in results)
        assert handle.records[0].predicted == list(plan.predicted_steps)


def test_each_thread_has_its_own_cache_context():
    pipeline, names = tiny.pipeline(), {}
    turn = taking_turns(2)
    with lesa.enable(pipeline, Reuse(), PLAN):
        contexts = pipeline.transformer._diffusers_hook.get_hook("lesa_cache_context").manager

        def work(name):
            with pipeline.transformer.cache_context(name):
                turn()
                names[name] = contexts.name
                turn()

        run_in_threads(lambda: work("cond"), lambda: work("uncond"))
        assert contexts.name is None
    assert names == {"cond": "cond", "uncond": "uncond"}
