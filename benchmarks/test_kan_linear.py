"""A KAN layer compared with inkan, which computes the same function, and with a linear layer as lower limit."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import kan_linear
from benchmarks.problems.problem import COMPILED

layers = functools.lru_cache(maxsize=1)(kan_linear.layer)


@pytest.mark.parametrize("provider", kan_linear.PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", kan_linear.LAYERS)
def test_a_layer(bench, request, name, direction, provider):
    if provider == COMPILED and direction == "backward" and name != "256 to 256":
        pytest.skip("compiling takes ten seconds each")
    smoke = request.config.getoption("smoke")
    bench(layers(kan_linear.SMOKE if smoke else kan_linear.LAYERS[name], DEVICE, direction), provider)
