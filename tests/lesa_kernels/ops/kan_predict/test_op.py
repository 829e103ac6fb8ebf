"""``kan_predict`` as an operation of PyTorch: gradients, fake tensors, compilation, export and autocast."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lesa_kernels import kan_predict
from lesa_kernels.ops.kan_predict import pieces, reference
from tests.lesa_kernels.ops.kan_predict.test_kernels import inputs

BACKENDS = ["triton", "auto"]
GRID = (-3.0, 3.0)


def leaves(window=3, steps=2, feature=(5, 8), *, dtype=torch.float32, weights=torch.float32, device="cpu"):
    """The seven tensors, all of which require gradients."""
    history, *others = inputs(window, steps, 2, feature, device=device)
    others.append(0.5 + torch.rand(feature[-1], device=device))
    return [history.to(dtype).requires_grad_(), *(t.to(weights).requires_grad_() for t in others)]


def predict(*tensors: Tensor, backend="auto", order=3) -> Tensor:
    return kan_predict(*tensors[:6], scale=tensors[6], backend=backend, order=order)


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(pieces, "GRADIENT_PIECE", 24)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_match_finite_differences(order, backend) -> None:
    tensors = leaves(dtype=torch.float64, weights=torch.float64)
    assert gradcheck(lambda *t: predict(*t, order=order, backend=backend), tensors, fast_mode=True)
    assert gradgradcheck(lambda *t: predict(*t, order=order, backend=backend), tensors, fast_mode=True)


@pytest.mark.usefixtures("small_pieces", "poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_match_float64(dtype, backend, device) -> None:
    """The error is at most twice that of the reference's gradients in the same dtype."""
    tensors = leaves(4, 3, dtype=dtype, device=device)
    grad = torch.randn(3, 5, 8, device=device).to(dtype)
    results = torch.autograd.grad(predict(*tensors, backend=backend), tensors, grad)
    eager = torch.autograd.grad(reference.kan_predict(*tensors, order=3, grid_range=GRID), tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(reference.kan_predict(*wide, order=3, grid_range=GRID), wide, grad.double())
    for result, plain, exact, leaf in zip(results, eager, expected, tensors, strict=True):
        assert result.dtype == leaf.dtype
        floor = 4e-6 * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("wanted", [(0,), (1,), (4, 6), (2, 3, 5)], ids=str)
def test_only_wanted_gradients_are_computed(wanted) -> None:
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves())]
    expected = torch.autograd.grad(predict(*tensors, backend="torch").sum(), [tensors[i] for i in wanted])
    predict(*tensors).sum().backward()
    for i, t in enumerate(tensors):
        assert (t.grad is not None) == (i in wanted)
    for i, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensors[i].grad, gradient)


def test_gradients_are_summed_over_tokens_before_they_are_rounded(monkeypatch) -> None:
    tensors = leaves(1, 1, (300, 1), weights=torch.bfloat16)
    exact = torch.autograd.grad(predict(*(t.double() for t in tensors)).sum(), tensors[5])[0]
    monkeypatch.setattr(pieces, "GRADIENT_PIECE", 1)
    result = torch.autograd.grad(predict(*tensors).sum(), tensors[5])[0]
    torch.testing.assert_close(result, exact, rtol=2**-7, atol=0)  # the sum is rounded once


def test_arguments_may_depend_on_each_other() -> None:
    """The gradient of one argument has no part of another argument that was computed from it."""
    x = torch.randn(3, 5, 8, requires_grad=True)
    _, *others, _ = leaves()
    results = []
    for backend in ("auto", "torch"):
        scale = x.square().mean((0, 1)) + 0.5
        (first,) = torch.autograd.grad(predict(x, *others, scale, backend=backend).sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("steps", "feature"), [(2, (0, 8)), (0, (3, 8))])
def test_gradients_of_empty_results_are_zero(steps, feature) -> None:
    tensors = leaves(steps=steps, feature=feature)
    predict(*tensors).sum().backward()
    assert all(t.grad is not None and t.grad.count_nonzero() == 0 for t in tensors)


def test_the_backward_pass_keeps_only_the_arguments() -> None:
    tensors = leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        predict(*tensors)
    assert set(kept) == {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, device) -> None:
    tensors = [t.detach() for t in leaves(dtype=dtype, device=device)]
    for scale in (tensors[6], None):
        torch.library.opcheck(torch.ops.lesa_kernels.kan_predict, (*tensors[:6], scale, 3, *GRID, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, device) -> None:
    tensors = leaves(device=device)
    compiled = torch.compile(predict, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, backend=backend), predict(*tensors))
    results = [
        torch.autograd.grad(f(*tensors, backend=b).square().sum(), tensors)
        for f, b in ((compiled, backend), (predict, "torch"))
    ]
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_compiles_for_any_number_of_tokens() -> None:
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(predict, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for tokens in (5, 7, 9):
            tensors = leaves(feature=(tokens, 8))
            torch.testing.assert_close(compiled(*tensors), predict(*tensors))
    assert graphs == 1


def test_exports_as_one_operation() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return predict(*tensors)

    tensors = tuple(t.detach() for t in leaves())
    exported = torch.export.export(Module(), tensors)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.lesa_kernels.kan_predict.default]
    torch.testing.assert_close(exported.module()(*tensors), predict(*tensors))


def test_fake_tensors_on_cuda_need_no_cuda() -> None:
    with FakeTensorMode():
        tensors = [t.detach() for t in leaves(dtype=torch.bfloat16, device="cuda")]
        result = predict(*tensors)
    assert (result.shape, result.dtype, result.device.type) == ((2, 5, 8), torch.bfloat16, "cuda")


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_autocast_rounds_neither_weights_nor_sums(backend, device) -> None:
    tensors = leaves(device=device)
    expected = torch.autograd.grad(predict(*tensors, backend=backend).sum(), tensors)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = predict(*tensors, backend=backend)
        assert torch.equal(result, predict(*tensors, backend=backend).float())
        gradients = torch.autograd.grad(result.sum(), tensors) if backend != "torch" else expected
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, predict(*tensors, backend=backend))
    torch.testing.assert_close(gradients, expected)
