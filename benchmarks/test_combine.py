"""Predictions from the history, and a Taylor prediction compared with cache-dit and diffusers."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import combine, taylor

one_problem = functools.lru_cache(maxsize=1)  # consecutive tests differ in the provider only, so inputs are made once
predictions = one_problem(combine.predictions)
gradients = one_problem(combine.gradients)
taylors = one_problem(taylor.taylor)


@pytest.mark.parametrize("provider", combine.PROVIDERS)
def test_one_prediction(bench, shape, provider):
    bench(predictions(shape, DEVICE, 1), provider)


@pytest.mark.parametrize("provider", [p for p in combine.PROVIDERS if p != "released graph"])
def test_the_predictions_of_an_interval(bench, shape, provider):
    bench(predictions(shape, DEVICE, shape.coming), provider)


@pytest.mark.parametrize("provider", ["ours", "reference"])
def test_gradients(bench, shape, provider):
    bench(gradients(shape, DEVICE, shape.coming), provider)


@pytest.mark.parametrize("provider", taylor.PROVIDERS)
def test_a_taylor_prediction(bench, shape, provider):
    bench(taylors(shape, DEVICE), provider)
