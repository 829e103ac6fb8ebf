"""``backend=`` of every operation: "torch" runs the reference, "auto" chooses by device."""

import importlib

import pytest
import torch

from lesa_kernels import backend
from tests.lesa_kernels.test_arguments import OPERATIONS, call

WITH_BACKENDS = ["combine", "gram_row", "fused_output_head", "kan_linear", "kan_predict", "prediction_error"]
NATIVE = {
    "combine": "combine.cpu",
    "gram_row": "combine.cpu",
    "fused_output_head": "fused_output_head.cpu",
    "weighted sum": "fused_output_head.cpu",
    "kan_linear": "kan_linear.cpu",
    "kan_predict": "kan_predict.pieces",
}


def drawn(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = {a: torch.randn(shape).to(dtype) for a, shape in OPERATIONS[name][1].items() if a != "out"}
    if "grid" in tensors:
        tensors["grid"] = tensors["grid"].sort(-1).values
    return tensors


def results(name, **arguments):
    result = OPERATIONS[name][0](**arguments)
    return result if isinstance(result, tuple) else (result,)


def without_native_code(name, monkeypatch):
    module = importlib.import_module(f"lesa_kernels.ops.{NATIVE[name]}")
    for function in (
        "combine",
        "gram_row",
        "gradients",
        "fused_output_head",
        "forward",
        "input_gradient",
        "kan_predict",
    ):
        if hasattr(module, function):
            monkeypatch.delattr(module, function)


@pytest.mark.parametrize("name", NATIVE)
def test_the_torch_backend_runs_only_the_reference(name, monkeypatch):
    tensors = drawn(name)
    native = results(name, **tensors, backend="native")
    without_native_code(name, monkeypatch)
    plain = results(name, **tensors, backend="torch")
    for ours, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    sum(
        r.sum() for r in results(name, **{a: t.requires_grad_() for a, t in tensors.items()}, backend="torch")
    ).backward()


@pytest.mark.parametrize("name", NATIVE)
def test_auto_uses_the_native_backend_on_a_cpu(name, monkeypatch):
    tensors = drawn(name)
    for ours, expected in zip(results(name, **tensors), results(name, **tensors, backend="native"), strict=True):
        assert torch.equal(ours, expected)
    without_native_code(name, monkeypatch)
    for chosen in ("auto", "native"):
        with pytest.raises((AttributeError, NameError)):
            results(name, **tensors, backend=chosen)


def test_the_torch_backend_calls_the_reference_unchanged():
    for name in ("combine", "fused_output_head", "kan_linear", "kan_predict", "prediction_error", "gram_row"):
        reference = getattr(importlib.import_module(f"lesa_kernels.ops.{name}.reference"), name)
        tensors = drawn(name, torch.bfloat16 if name not in ("kan_linear", "kan_predict") else torch.float32)
        options = {"kan_linear": {"order": 3, "grid_range": (-3.0, 3.0)}, "fused_output_head": {"eps": 1e-6}}
        options["kan_predict"] = options["kan_linear"]
        given = {a: t for a, t in tensors.items() if a != "means"} | options.get(name, {})
        assert torch.equal(OPERATIONS[name][0](**tensors, backend="torch"), reference(**given)), name


@pytest.mark.parametrize("name", WITH_BACKENDS)
def test_unknown_backends_and_native_on_other_devices_are_refused(name):
    for wrong in ("cuda", "cpu", None, ""):
        with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'native', 'torch', not"):
            call(name, backend=wrong)
    with pytest.raises(RuntimeError, match=r"backend='native' needs tensors on a CPU, these are on meta"):
        call(name, "meta", backend="native")
    call(name, "meta", backend="torch")


def test_the_backend_of_each_operation_by_device_and_dtype(monkeypatch):
    class On:
        def __init__(self, device):
            self.device, self.is_cuda = torch.device(device), device == "cuda"

    chosen = {device: backend.choose_backend("auto", On(device)) for device in ("cpu", "cuda", "mps", "meta")}
    assert chosen == {"cpu": "native", "cuda": "triton", "mps": "torch", "meta": "torch"}
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.choose_backend("auto", On("cuda")) == "torch"
    with pytest.raises(RuntimeError, match="pip install"):
        backend.choose_backend("triton", On("cuda"))
