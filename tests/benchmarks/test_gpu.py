"""benchmarks/gpu.py runs from start to end without a GPU, in its smoke mode."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.architectures import ARCHITECTURES
from benchmarks.report.registry import ROOT
from benchmarks.shapes import SHAPES


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--smoke",
        "--budget",
        "1e9",
        "--out",
        str(out),
    ]  # no time limit
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return json.loads(out.read_text())


def test_no_section_fails_and_none_is_skipped(result):
    assert result["smoke"]
    assert result["failed"] == []
    if not torch.cuda.is_available():
        assert result["skipped"] == []


def test_every_provider_was_checked_and_timed(result):
    rows = result["kernels"] + result["kan"]
    assert {"combine, 1 of 4", "head, 3 of 4", "interval", "kan_linear"} <= {row["operation"] for row in rows}
    assert all(row["wall_median"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert all(row["error"] < 0.1 for row in rows if row["provider"] in ("ours", "reference", "closed loop"))


def test_every_method_has_as_many_full_steps_on_every_architecture(result):
    rows = result["loops"]
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        expected = 12 if row["method"] == "full sampler" else 5
        assert (row["full_steps"], row["method"]) == (expected, row["method"])
        assert row["ideal"] == 12 / expected


def test_kernel_tests_and_sanitizer_calls_ran(result):
    assert result["tests"][0]["status"] == 0
    assert "passed" in result["tests"][0]["summary"][-1]
    if not torch.cuda.is_available():
        assert "were right" in result["sanitizer"][0]["summary"][-1]


def test_without_diffusers_the_loops_are_skipped_with_a_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert gpu.main(["--smoke", "--here", "loops", "--out", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["loops"] == []
    assert found["skipped"] == ["denoising loops: diffusers is not installed"]


def test_a_failing_section_is_recorded_and_the_others_run(tmp_path):
    run = gpu.Run(tmp_path / "gpu.json", smoke=True, budget=60)
    run.section("first", lambda _: (1 // (1 - i) for i in range(2)))
    run.section("second", lambda _: [1])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == ["first: ZeroDivisionError: integer division or modulo by zero"]
    assert (found["first"], found["second"]) == ([1], [1])
    late = gpu.Run(None, smoke=True, budget=-1)
    late.section("third", lambda _: [1])
    assert late.result["skipped"] == ["third: no time left"]


def test_a_process_that_dies_fails_only_its_own_sections(monkeypatch, tmp_path):
    run = gpu.Run(tmp_path / "gpu.json", smoke=True, budget=60)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, -6))
    run.elsewhere(["kernels"])
    assert run.result["failed"] == ["kernels: RuntimeError: its process ended with status -6"]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda made: made.name)
def test_a_published_image_size_gives_the_shape_of_its_feature(architecture):
    features = []
    with torch.device("meta"), torch.no_grad():
        transformer, inputs = architecture.build(2, False)
        transformer.norm_out.register_forward_pre_hook(lambda _, given: features.append(given[0].shape))
        transformer(**inputs, timestep=torch.ones(1), return_dict=False)
    assert features == [SHAPES[architecture.name].feature]
