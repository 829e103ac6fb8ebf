import pytest

from lesa.adapters.diffusers.endings import KNOWN
from tests.lesa.adapters import tiny


@pytest.fixture(params=["end known", "blocks handed through"])
def way(request, monkeypatch):
    """Both ways through a predicted step: straight to the end of the model, and through its forward."""
    if request.param == "blocks handed through":
        monkeypatch.delitem(KNOWN, "FluxTransformer2DModel")
    return request.param


@pytest.fixture
def pipeline():
    return tiny.pipeline()


@pytest.fixture
def handed_through(monkeypatch):
    """Predicted steps go through the forward, where the head's input can be seen."""
    monkeypatch.delitem(KNOWN, "FluxTransformer2DModel")
