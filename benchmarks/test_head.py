"""The outputs of a transformer at all predicted steps of an interval."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import head

outputs = functools.lru_cache(maxsize=1)(head.outputs)


@pytest.mark.parametrize("provider", head.PROVIDERS)
def test_the_outputs_of_an_interval(bench, shape, provider):
    bench(outputs(shape, DEVICE), provider)
