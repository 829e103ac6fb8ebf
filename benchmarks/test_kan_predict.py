"""LESA with a KAN on the features: bound by arithmetic, so a CPU gets few tokens."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import kan_predict

predictions = functools.lru_cache(maxsize=1)(kan_predict.predictions)
SHARE = 1 if DEVICE == "cuda" else 1 / 16


@pytest.mark.parametrize("provider", kan_predict.PROVIDERS)
@pytest.mark.parametrize("whole", [False, True], ids=["step", "interval"])
def test_predictions(bench, shape, whole, provider):
    few = shape.within(SHARE * shape.kept * shape.nbytes)
    bench(predictions(few, DEVICE, shape.coming if whole else 1), provider)
