"""The gate sees a kernel that became 25 % slower, and nothing where nothing changed."""

import time

import pytest

from benchmarks import check, ratios
from benchmarks.exact import launches
from lesa_kernels.ops.combine import cpu

NAMES = ["combine, one prediction, float32", "Taylor 2, bfloat16"]
SECONDS = 0.8


@pytest.fixture(scope="module")
def problems():
    everything = ratios.problems("cpu")
    return {name: everything[name] for name in NAMES}


def best_of(problems):
    """Expectations from here and now, the best of as many attempts as the gate makes: the suite shares its machine."""
    runs = [check.measure_ratios(problems, SECONDS) for _ in range(check.ATTEMPTS)]
    return {name: min(run[name].value for run in runs) for name in problems}


@pytest.mark.alone
def test_a_kernel_made_25_percent_slower_fails_and_an_unchanged_one_passes(problems, monkeypatch):
    expected = best_of(problems)
    assert list(check.compare_ratios(problems, expected, check.SLOWER, SECONDS)) == []
    combine = cpu.combine

    def slower(*arguments, **options):
        start = time.perf_counter()
        result = combine(*arguments, **options)
        end = time.perf_counter()
        while time.perf_counter() < end + 0.25 * (end - start):
            pass
        return result

    monkeypatch.setattr(cpu, "combine", slower)
    found = list(check.compare_ratios(problems, expected, check.SLOWER, SECONDS))
    assert [line.split(":")[0] for line in found] == NAMES


def test_a_ratio_that_nobody_wrote_down_is_said_to_be(problems):
    (line, _) = check.compare_ratios(problems, {}, check.SLOWER, SECONDS)
    assert "nothing is expected of it" in line


def test_a_count_that_changed_is_named():
    was = {"head": {"operators": 60, "peak": 100}, "combine": ["combine_kernel"]}
    now = {"head": {"operators": 61, "peak": 100}, "combine": ["combine_kernel"], "new": {"operators": 1}}
    assert list(check.compare_exactly("counts", now, was)) == [
        "counts of head: operators 60 -> 61",
        "counts of new: None -> {'operators': 1}",
    ]
    assert list(check.compare_exactly("counts", was, was)) == []


def test_every_function_launches_as_few_kernels_as_expected():
    import json

    expected = json.loads(check.EXPECTATIONS.read_text())["launches"]
    assert list(check.compare_exactly("launches", launches(), expected)) == []
