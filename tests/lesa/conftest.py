"""Fixtures of several folders: the tiny pipeline, and the two paths through a predicted step."""

import pytest

from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS
from tests.lesa.adapters.diffusers import tiny


@pytest.fixture(params=["output head known", "blocks skipped"])
def predicted_path(request, monkeypatch):
    """Both paths through a predicted step: only the output head, or the forward whose blocks return their inputs."""
    if request.param == "blocks skipped":
        monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
    return request.param


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.fixture
def blocks_skipped(monkeypatch):
    """Predicted steps run the forward and skip its blocks, so that the input of the output head can be read."""
    monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
