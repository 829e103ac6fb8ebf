"""A row of a Gram matrix."""

import functools

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.problems import gram

rows = functools.lru_cache(maxsize=1)(gram.row)


@pytest.mark.parametrize("provider", gram.PROVIDERS)
def test_a_row(bench, shape, provider):
    bench(rows(shape, DEVICE), provider)
