"""Compiles all kernels once, in a separate process without the interpreter and with a new Triton cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# make gate sets LESA_GATE to several GPUs; every case is then compiled, rare ones too
CAPABILITIES = [int(c) for c in os.environ.get("LESA_GATE", "90").split(",")]
FEW = [] if "LESA_GATE" in os.environ else ["--few"]


@pytest.fixture(scope="session", params=CAPABILITIES, ids=lambda c: f"sm_{c}")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The measured properties of an operation's machine code: ``compiled("combine")["name of case"]``."""
    pytest.importorskip("triton")
    results: dict[tuple[str, ...], dict[str, Any]] = {}

    def get(operation: str, *flags: str) -> dict[str, Any]:
        if (operation, *flags) not in results:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"triton-{operation}"))
            run = subprocess.run(
                [sys.executable, "-m", "tests.gate.worker", str(request.param), *(flags or FEW), operation],
                capture_output=True,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            assert run.returncode == 0, run.stderr[-4000:]
            rows = {row.pop("case"): row for row in map(json.loads, run.stdout.splitlines())}
            results[operation, *flags] = rows
        return results[operation, *flags]

    return get
