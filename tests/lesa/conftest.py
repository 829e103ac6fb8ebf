import pytest

from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS
from tests.lesa.adapters.diffusers import tiny


@pytest.fixture(params=["end known", "blocks handed through"])
def way(request, monkeypatch):
    """Both ways through a predicted step: straight to the end of the model, and through its forward."""
    if request.param == "blocks handed through":
        monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
    return request.param


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.fixture
def handed_through(monkeypatch):
    """Predicted steps go through the forward, where the head's input can be seen."""
    monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
