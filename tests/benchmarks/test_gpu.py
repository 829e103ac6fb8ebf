"""The GPU run goes from start to end without a GPU, in its smoke mode, and survives what happens on a borrowed one."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.gpu import __main__ as run
from benchmarks.gpu.part import Part
from benchmarks.gpu.summary import MOST_LINES, summary
from benchmarks.report.registry import ROOT
from benchmarks.shapes import SHAPES

PARTS = list(run.LIMITS)
SMOKE = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out"]


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run([*SMOKE, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert all(f"{part}: no limit" in done.stdout for part in PARTS)  # said before the first part begins
    return out


def test_every_part_is_done_without_failures(folder):
    for part in PARTS:
        found = read(folder, part)
        assert (found["smoke"], found["finished"], found["failed"]) == (True, True, [])
        assert found["rows"]
        if not torch.cuda.is_available():
            assert found["skipped"] == []


def test_what_is_written_fits_what_comes_back_from_a_borrowed_machine(folder):
    files = list(folder.iterdir())
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in files) < 1 << 20
    assert 1 < len((folder / "summary.txt").read_text().splitlines()) <= MOST_LINES


def test_every_provider_was_checked_and_timed(folder):
    rows = [row for part in ("kernels", "kan") for row in read(folder, part)["rows"] if row["operation"] != "copy"]
    assert {"combine, 1 of 4", "head, 3 of 4", "interval", "kan_linear"} <= {row["operation"] for row in rows}
    assert all(row["wall_median"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert all(row["error"] < 0.1 for row in rows if row["provider"] in ("ours", "reference", "closed loop"))
    kept = {row["provider"]: row["kept_bytes"] for row in rows if "kept_bytes" in row}
    assert kept["ours"] * 5 < kept["reference"]


def test_every_method_has_as_many_full_steps_on_every_architecture(folder):
    rows = read(folder, "loops")["rows"]
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        expected = 12 if row["method"] == "full sampler" else 5
        assert (row["full_steps"], row["method"]) == (expected, row["method"])
        assert row["ideal"] == 12 / expected


def test_tests_and_sanitizer_calls_ran(folder):
    first, tests = read(folder, "correctness")["rows"]
    assert (first["status"], tests["status"]) == (0, 0)
    assert "passed" in tests["summary"][-1]
    if not torch.cuda.is_available():
        assert "were right" in read(folder, "memcheck")["rows"][0]["summary"][-1]


# hides packages from imports and from find_spec, as on a machine that lacks them
WITHOUT = """
import importlib.util, runpy, sys
HIDDEN = ("diffusers", "cache_dit", "inkan")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in HIDDEN else real(name, *rest)
sys.meta_path.insert(0, Hidden())
sys.argv[0] = "benchmarks.gpu"
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("part", ["kernels", "loops"])
def test_a_machine_without_diffusers_and_peers_measures_the_rest(tmp_path, part):
    command = [sys.executable, "-c", WITHOUT, "--smoke", "--here", "1e9", "--part", part, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = read(tmp_path, part)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if part == "loops":
        assert (found["rows"], found["skipped"]) == ([], ["denoising loops: diffusers is not installed"])
    else:
        assert found["rows"]
        assert {row.get("provider") for row in found["rows"]}.isdisjoint({"diffusers", "cache-dit", "inkan"})


def test_a_run_that_is_killed_loses_at_most_the_row_in_progress(tmp_path):
    process = subprocess.Popen(
        [*SMOKE, str(tmp_path), "--part", "kernels"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            if (tmp_path / "kernels.json").exists() and len(read(tmp_path, "kernels")["rows"]) >= 2:
                break
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        [part] = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        process.terminate()
        process.wait()
    found = read(tmp_path, "kernels")
    assert len(found["rows"]) >= 2
    assert not found["finished"]
    assert not Path(f"/proc/{part}").exists()
    assert "kernels: stopped half-way" in summary(tmp_path, ["kernels", "kan"])[0]


def test_a_part_that_takes_too_long_is_stopped_and_its_rows_stay(tmp_path, monkeypatch):
    options = run.argparse.Namespace(out=tmp_path, smoke=True, commit=None)
    Part(tmp_path, "kernels", smoke=True, budget=1).add({"operation": "copy", "gb_per_s": 1.0})
    start = subprocess.Popen  # a process that sleeps stands for a part that hangs
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **options: start(["sleep", "60"], **options))
    run.run_part("kernels", 0.2, options)
    assert len(read(tmp_path, "kernels")["rows"]) == 1


def test_a_failing_part_is_recorded_and_the_summary_names_it(monkeypatch, tmp_path):
    options = run.argparse.Namespace(out=tmp_path, smoke=True, commit="abc", here=60.0)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.kan", SimpleNamespace(measure=lambda part: 1 // 0))
    assert run.run_here("kan", options) == 1
    found = read(tmp_path, "kan")
    assert found["failed"] == ["kan: ZeroDivisionError: integer division or modulo by zero"]
    assert found["environment"]["commit"] == "abc"
    lines = summary(tmp_path, PARTS)
    assert "kernels: left no result" in lines
    assert f"FAILED {found['failed'][0]}" in lines


def test_a_summary_of_half_a_result_has_what_there_is(tmp_path):
    part = Part(tmp_path, "kernels", smoke=False, budget=60)
    part.add({"operation": "copy", "gb_per_s": 4000.0})
    row = {"operation": "combine, 6 of 8", "direction": "forward", "shape": "FLUX.1-dev 1024", "provider": "ours"}
    part.add(row | {"bytes": 400_000_000, "device_median": 1e-4})
    part.add(row | {"provider": "copy", "bytes": 400_000_000, "failed": "out of memory"})
    lines = summary(tmp_path, ["kernels"])
    assert lines[1:] == ["copy: 4000 GB/s", "combine, 6 of 8, FLUX.1-dev 1024: 100 us, 100% of a copy's rate"]


def test_failures_are_in_a_summary_however_many_numbers_there_are(tmp_path):
    part = Part(tmp_path, "loops", smoke=False, budget=60)
    for number in range(40):
        part.add({"architecture": "a", "method": str(number), "speedup": 2.0, "share_of_ideal": 1.0})
    part.fail("a, b", "broken")
    (tmp_path / "kan.json").write_text('{"rows": [')  # a copy that was cut off
    lines = summary(tmp_path, ["loops", "kan"])
    assert len(lines) == MOST_LINES
    assert lines[1:3] == ["kan: left no result", "FAILED a, b: broken"]


def test_results_of_an_earlier_run_do_not_pass_for_new_ones(tmp_path):
    Part(tmp_path, "kan", smoke=True, budget=1).finish()
    options = run.argparse.Namespace(out=tmp_path, smoke=False, commit=None, part=["kan"], budget=0.0)
    assert run.run_all(options) == 1
    assert (tmp_path / "summary.txt").read_text() == "kan: left no result\n"


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda made: made.name)
def test_a_published_image_size_gives_the_shape_of_its_feature(architecture):
    features = []
    with torch.device("meta"), torch.no_grad():
        transformer, inputs = architecture.build(2, False)
        transformer.norm_out.register_forward_pre_hook(lambda _, given: features.append(given[0].shape))
        transformer(**inputs, timestep=torch.ones(1), return_dict=False)
    assert features == [SHAPES[architecture.name].feature]
