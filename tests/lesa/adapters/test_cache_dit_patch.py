"""The patch that docs/patches holds for cache-dit, on a copy of the installed one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cache_dit

ROOT = Path(__file__).parents[3]
PATCH = ROOT / "docs" / "patches" / "cache-dit-register-calibrator.patch"
OURS = """
from cache_dit.caching.cache_contexts import cache_context, calibrators
import lesa
from lesa.adapters.cache_dit import ForecasterCalibrator, ForecasterConfig


def test_nothing_of_cache_dit_is_replaced():
    made = cache_context.Calibrator(ForecasterConfig(lesa.Taylor(1), 50))
    assert isinstance(made, ForecasterCalibrator)
    assert cache_context.Calibrator is calibrators.Calibrator
"""


def test_it_applies_and_registers_our_calibrator_in_public(tmp_path):
    installed = Path(cache_dit.__file__).parent
    shutil.copytree(installed, tmp_path / "src" / "cache_dit", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    (tmp_path / "tests" / "test_ours.py").write_text(OURS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert "4 passed" in ran.stdout
