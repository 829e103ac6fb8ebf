import pytest

from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS
from tests.lesa.adapters.diffusers import tiny


@pytest.fixture(params=["output head known", "blocks skipped"])
def way(request, monkeypatch):
    """Both ways to compute a predicted step: by the known output head, and by the forward without blocks."""
    if request.param == "blocks skipped":
        monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
    return request.param


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.fixture
def blocks_skipped(monkeypatch):
    """Predicted steps go through the forward, where the head's input can be seen."""
    monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
