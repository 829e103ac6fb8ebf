"""The benchmark suite runs, and its clocks and counters are correct."""

import importlib
import itertools
import os
import pkgutil
import subprocess
import sys
import types

import pytest
import torch

import benchmarks
from benchmarks import clocks, optimisations, scaling, training_cost
from benchmarks.census import census
from benchmarks.clocks import DeviceClock, Timer, measure, one_round
from benchmarks.report.registry import ROOT
from benchmarks.scaling import exponent
from benchmarks.shapes import SHAPES, SMOKE

MODULES = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_benchmarks_can_be_imported(name):
    importlib.import_module(name)


@pytest.mark.parametrize("closed", [False, True])
def test_the_cost_of_training_is_measured_both_ways(closed, monkeypatch):
    monkeypatch.setattr(training_cost, "CHANNELS", 8)
    assert training_cost.ours(2, closed=closed, rounds=1) > 0
    assert training_cost.released(2, closed=closed) > 0


def test_every_benchmark_checks_its_providers_on_a_tiny_shape():
    command = ["-m", "pytest", "benchmarks", "--smoke", "--benchmark-disable", "-q", "-k", "not compiled and not inkan"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stdout[-4000:]


class FakeCuda:
    """A fake CUDA stream: it waits 5 s for the backlog; a call then takes the time that a test adds to ``now``."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        self.log.append("sleep")
        self.now += 5.0

    def Event(self, enable_timing):  # noqa: N802 (torch's name)
        cuda = self

        class Event:
            def record(self):
                cuda.log.append("record")
                self.at = cuda.now

            def synchronize(self):
                cuda.log.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


def test_the_device_clock_excludes_queued_work_and_gaps_of_the_host():
    cuda = FakeCuda()

    def call():
        cuda.log.append("call")
        cuda.now += 0.01

    seconds = one_round(call, DeviceClock(0.001, cuda), 3)
    assert abs(seconds - 0.01) < 1e-9
    assert cuda.log == ["synchronize", "sleep", "record", "call", "call", "call", "record", "wait"]


def test_a_timer_gives_differences_of_two_readings():
    cuda = FakeCuda()
    timer = Timer(DeviceClock(0.001, cuda))
    for _ in range(2):
        start = timer()
        cuda.now += 0.25
        assert abs(timer() - start - 0.25) < 1e-9


def test_a_measurement_has_the_median_and_the_outer_fifths_of_its_rounds(monkeypatch):
    now, durations = [0.0], itertools.chain([0.01] * 4, itertools.cycle([0.01, 0.02, 0.05, 0.02, 0.03]))

    def call():
        now[0] += next(durations)

    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    found = measure(call, "device", "cpu", budget=0.25)
    assert found.rounds == 25
    assert found.as_json() == pytest.approx({"median": 0.02, "low": 0.018, "high": 0.034, "rounds": 25})


def test_a_census_counts_operators_and_bytes():
    x = torch.ones(1 << 20)

    def call():
        y = x + x  # allocates 4 MiB
        z = y * x  # allocates 4 MiB more
        del y
        return z - x  # reuses the memory of y

    counted = census(call)
    assert counted.operators == 3
    assert counted.allocated == 3 * x.nbytes
    assert counted.peak == 2 * x.nbytes
    assert census(call) == counted


def test_a_shape_is_cut_to_what_fits_and_is_marked():
    video = SHAPES["HunyuanVideo 720p"]
    few = video.within(32 * 2**20)
    assert few.kept * few.nbytes <= 32 * 2**20 < video.kept * video.nbytes
    assert few.name == f"HunyuanVideo 720p ({few.tokens} tokens)"
    assert SHAPES["demo"].within(2**30) is SHAPES["demo"]


def test_the_exponent_of_a_power_law_ignores_constant_costs():
    sizes = [1 << power for power in range(10, 24)]
    assert abs(exponent(sizes, [1e-4 + 1e-9 * n**1.5 for n in sizes]) - 1.5) < 0.01


def test_every_curve_can_be_measured(monkeypatch):
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    for row in scaling.points(scaling.CURVES, most=2):
        assert len(row["seconds"]) == 2
        assert all(seconds > 0 for seconds in row["seconds"])


def test_every_stage_of_optimisation_makes_the_same_outputs():
    with torch.inference_mode():
        rows = optimisations.stages(SMOKE, rounds=1)
    assert [row["way"] for row in rows] == list(optimisations.STAGES)
    assert all(row["error"] < 1e-5 for row in rows)
    assert rows[-1]["operators"] < rows[0]["operators"]
