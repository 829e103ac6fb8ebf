"""LESA with a KAN on the features. It is limited by arithmetic: a GPU gets 1/8 of the tokens, a CPU only 64."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import kan_predict
from benchmarks.problems.problem import COMPILED
from benchmarks.shapes import SHAPES, SMOKE, Shape

predictions = functools.lru_cache(maxsize=1)(kan_predict.predictions)
FEW = Shape("64 tokens of 256 channels", 1, 64, 256, 64)
FEATURES = [shape.within(shape.nbytes) for shape in SHAPES.values()] if DEVICE == "cuda" else [FEW]


@pytest.mark.parametrize("provider", kan_predict.PROVIDERS)
@pytest.mark.parametrize("whole", [False, True], ids=["step", "interval"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_predictions(bench, request, feature, whole, provider):
    if whole and provider == COMPILED:
        pytest.skip("six steps unrolled take the compiler a minute")
    feature = SMOKE if request.config.getoption("smoke") else feature
    bench(predictions(feature, DEVICE, feature.coming if whole else 1), provider)
