"""The regression check fails for a kernel that is 25 % slower, and for nothing else. The clock is a fake one."""

import json
import types

import pytest
import torch

from benchmarks import check, clocks, ratios
from benchmarks.exact import launches
from benchmarks.problems import combine, taylor
from benchmarks.problems.problem import OURS, REFERENCE, Problem
from benchmarks.shapes import SMOKE
from lesa_kernels.ops.combine import cpu, reference

SECONDS = 0.001


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: time passes only where a test adds to ``now``."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(clock, seconds, function=lambda *_: torch.zeros(())):
    """``function``, made to take ``seconds``: a number, or a function that returns the next duration."""

    def run(*arguments, **options):
        clock.now += seconds() if callable(seconds) else seconds
        return function(*arguments, **options)

    return run


def problem(clock, ours, theirs=0.01):
    """A problem whose kernel takes ``ours`` seconds and whose reference takes ``theirs``."""
    functions = {OURS: timed(clock, ours), REFERENCE: timed(clock, theirs)}
    made = Problem("sum", "forward", "a shape", 1, lambda: (), functions, lambda *_: 0.0, torch.float32)
    return {"sum": lambda: (made, REFERENCE)}


def failures(problems, expected=1.0, slower=check.SLOWER):
    return list(check.compare_ratios(problems, {"sum": expected}, slower, SECONDS))


def test_a_ratio_is_the_median_and_its_spread_half_the_quartile_distance(clock):
    steps = iter([0.01] * 5 + [0.005, 0.01, 0.02, 0.01, 0.04] * 3 + [0.01] * 99)
    (make,) = problem(clock, lambda: next(steps)).values()
    found = ratios.measure(*make(), "cpu", seconds=SECONDS)
    assert found.rounds == ratios.LEAST_ROUNDS
    assert found.value == pytest.approx(1)
    assert found.spread == pytest.approx(0.5)


@pytest.mark.parametrize(("factor", "fails"), [(0.5, False), (1, False), (1.14, False), (1.16, True), (1.25, True)])
def test_a_ratio_that_grew_by_more_than_15_percent_fails(clock, factor, fails):
    found = failures(problem(clock, 0.01 * factor))
    assert bool(found) == fails
    if fails:
        assert found[0].startswith(f"sum: {factor - 1:.0%} slower than expected beside its reference")


def test_a_machine_that_is_slower_for_both_sides_does_not_fail(clock):
    assert failures(problem(clock, 0.03, 0.03)) == []


def test_a_few_slow_rounds_do_not_fail(clock):
    turn = iter(range(10**6))
    assert failures(problem(clock, lambda: 0.01 if next(turn) % 3 else 0.05)) == []


@pytest.mark.parametrize(("busy", "fails"), [(1, False), (check.ATTEMPTS - 1, False), (check.ATTEMPTS, True)])
def test_a_ratio_has_to_be_slow_in_every_attempt_to_fail(clock, monkeypatch, busy, fails):
    values, measured = iter([2.0] * busy + [1.0]), []

    def measure(*_, **__):
        measured.append(next(values))
        return ratios.Ratio(measured[-1], 0.0, 15)

    monkeypatch.setattr(ratios, "measure", measure)
    assert bool(failures(problem(clock, 0.01))) == fails
    assert len(measured) == min(busy + 1, check.ATTEMPTS)


def test_on_another_kind_of_machine_a_ratio_may_double(clock):
    assert failures(problem(clock, 0.019), slower=check.SLOWER_ELSEWHERE) == []
    assert len(failures(problem(clock, 0.021), slower=check.SLOWER_ELSEWHERE)) == 1


def test_a_kernel_25_percent_slower_fails_and_an_unchanged_one_passes(clock, monkeypatch):
    """With the real calls: the check times the kernel and its reference."""
    problems = {
        "combine": lambda: (combine.predictions(SMOKE, "cpu", 1), REFERENCE),
        "Taylor": lambda: (taylor.taylor(SMOKE, "cpu"), REFERENCE),
    }
    kernel = cpu.combine
    monkeypatch.setattr(reference, "combine", timed(clock, 0.02, reference.combine))
    monkeypatch.setattr(cpu, "combine", timed(clock, 0.01, kernel))
    expected = {name: ratio.value for name, ratio in check.measure_ratios(problems, SECONDS).items()}
    assert expected == {name: pytest.approx(0.5) for name in problems}
    assert list(check.compare_ratios(problems, expected, check.SLOWER, SECONDS)) == []
    monkeypatch.setattr(cpu, "combine", timed(clock, 0.0125, kernel))
    found = list(check.compare_ratios(problems, expected, check.SLOWER, SECONDS))
    assert [line.split(",")[0] for line in found] == [
        f"{name}: 25% slower than expected beside its reference (0.625" for name in problems
    ]


def test_a_ratio_without_an_expectation_is_reported():
    line, *others = check.compare_ratios(ratios.problems("cpu"), {}, check.SLOWER, SECONDS)
    assert len(others) > 5
    assert "nothing is expected of it" in line


def test_a_count_that_changed_is_named():
    was = {"head": {"operators": 60, "peak": 100}, "combine": ["combine_kernel"]}
    now = {"head": {"operators": 61, "peak": 100}, "combine": ["combine_kernel"], "new": {"operators": 1}}
    assert list(check.compare_exactly("counts", now, was)) == [
        "counts of head: operators 60 -> 61",
        "counts of new: None -> {'operators': 1}",
    ]
    assert list(check.compare_exactly("counts", was, was)) == []


def test_every_function_launches_the_expected_kernels():
    expected = json.loads(check.EXPECTATIONS.read_text())["launches"]
    assert list(check.compare_exactly("launches", launches(), expected)) == []
