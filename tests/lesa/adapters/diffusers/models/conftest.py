"""Results of these tests, which are written to ``$LESA_SUPPORT`` for the table of docs/models.md."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lesa.reports.environment import describe_environment

Support = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def support() -> Iterator[Support]:
    """Results by name of the row."""
    found: Support = {}
    yield found
    if path := os.environ.get("LESA_SUPPORT"):
        environment = describe_environment(("diffusers", "torch", "transformers"))
        Path(path).write_text(json.dumps({"environment": environment, "models": found}, indent=1) + "\n")


@pytest.fixture
def blocks_skipped_in_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted steps run the forward and skip its blocks; known output heads round differently."""
    monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
