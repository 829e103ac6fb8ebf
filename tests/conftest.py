"""Without a GPU, Triton kernels run in Triton's interpreter, which must be selected before Triton is imported."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# the same examples in every run, and no deadline: a slow or shared machine must not fail a test
settings.register_profile(
    "lesa", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lesa")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    assert "triton" not in sys.modules, "triton was imported before its interpreter could be selected"
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# These few tests take a minute each. They start first, so that no core is idle at the end.
LONG = ("tests/lesa/demo/", "tests/lesa/adapters/diffusers/test_what_users_do", "tests/gate/", "tests/benchmarks/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN, so that a test fails if a kernel leaves an element unwritten."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return poisoned
