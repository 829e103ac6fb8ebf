"""The work between two full steps, and a denoising loop of the demo compared with other caches."""

import functools
from importlib.util import find_spec

import pytest
import torch

from benchmarks.conftest import DEVICE, time_call
from benchmarks.problems import interval

intervals = functools.lru_cache(maxsize=1)(interval.interval)
steps = functools.lru_cache(maxsize=1)(interval.predicted_step)
METHODS = ("full sampler", "LESA", "Taylor 2", "reuse", "diffusers TaylorSeer (lite)", "cache-dit")


@pytest.mark.parametrize("provider", interval.PROVIDERS)
def test_an_interval(bench, shape, provider):
    bench(intervals(shape, DEVICE), provider)


@pytest.mark.parametrize("provider", interval.PROVIDERS)
def test_a_predicted_step(bench, shape, provider):
    bench(steps(shape, DEVICE), provider)


@functools.cache
def loop_methods():
    """The methods of the loop, and the full sampler's image."""
    from benchmarks.demo.loop import STEPS, methods
    from lesa.demo.model import request

    chosen = {name: (pipeline.to(DEVICE), enabled) for name, pipeline, enabled in methods()}
    pipeline, _ = chosen["full sampler"]
    return chosen, pipeline(**request([3], [0], num_steps=STEPS)).images


@pytest.mark.parametrize("provider", METHODS)
def test_a_denoising_loop(benchmark, request, clock, provider):
    if not find_spec("diffusers"):
        pytest.skip("diffusers is not installed")
    if clock == "device":
        pytest.skip("a loop is what its caller waits for")
    from benchmarks.demo.loop import STEPS
    from lesa.demo.model import request as arguments

    chosen, full = loop_methods()
    pipeline, enabled = chosen[provider]
    with enabled(pipeline):
        image = pipeline(**arguments([3], [0], num_steps=STEPS)).images
        assert float((image - full).norm() / full.norm()) < 0.5
        with torch.inference_mode():
            time_call(benchmark, lambda: pipeline(**arguments([3], [0], num_steps=STEPS)), clock, "loop/forward/demo")
