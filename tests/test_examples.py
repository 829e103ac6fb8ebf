"""Every file in examples/ runs unchanged: all in one process, to import only once, each in a separate folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
RUNNER = """
import json, os, runpy, sys, traceback
results, folder, *paths = sys.argv[1:]
for place, path in enumerate(paths):
    os.makedirs(f"{folder}/{place}")
    os.chdir(f"{folder}/{place}")
    failure = None
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        failure = traceback.format_exc()
    with open(results, "a") as file:
        print(json.dumps([path, failure]), file=file)
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The traceback of each example, or None."""
    folder = tmp_path_factory.mktemp("examples")
    results, environment = folder / "results.jsonl", os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, str(results), str(folder), *map(str, EXAMPLES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return dict(map(json.loads, results.read_text().splitlines()))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(path, failures):
    assert failures[str(path)] is None, failures[str(path)]
