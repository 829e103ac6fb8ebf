"""A KAN layer is a function of its parameters and buffers only, however these were changed."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel

from lesa_kernels import KANLinear, kan_linear
from lesa_kernels.ops.kan_linear import uniform
from tests.lesa_kernels.ops.kan_linear.test_modules import trained

X = torch.linspace(-2, 2, 40)[:, None] * torch.tensor([1.0, -0.7, 0.3])


def moved() -> KANLinear:
    """A layer whose grid was updated."""
    layer = trained(3, 2)
    layer.update_grid(torch.randn(200, 3) * 0.7)
    return layer


def by_reference(layer: KANLinear, x: Tensor) -> Tensor:
    """The output of the reference with the layer's parameters and knots."""
    return kan_linear(x, layer.base_weight, layer.scaled_spline_weight, grid=layer.grid, backend="torch")


def assert_follows_its_state(layer: KANLinear, x: Tensor = X) -> None:
    """Output, first and second gradients equal those of the reference for the layer's state."""
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    for function in (layer, lambda x: by_reference(layer, x)):
        y = function(x)
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), leaves)
        if function is layer:
            found = [y, *gradients, *second]
        else:
            for ours, expected in zip(found, [y, *gradients, *second], strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.detach().abs().max().item())


def copy_everything(source: KANLinear, target: KANLinear) -> None:
    with torch.no_grad():
        for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            ours.copy_(theirs)


def copy_data(source: KANLinear, target: KANLinear) -> None:
    """Copy through ``.data``, as many weight averages do; autograd's version counter does not see it."""
    for tensors in (lambda m: m.parameters(), lambda m: m.buffers()):
        for ours, theirs in zip(tensors(target), tensors(source), strict=True):
            ours.data.copy_(theirs.data)


def replace_data(source: KANLinear, target: KANLinear) -> None:
    for tensors in (lambda m: m.parameters(), lambda m: m.buffers()):
        for ours, theirs in zip(tensors(target), tensors(source), strict=True):
            ours.data = theirs.data.clone()


def load(source: KANLinear, target: KANLinear) -> None:
    target.load_state_dict(source.state_dict())


def assign(source: KANLinear, target: KANLinear) -> None:
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)


WAYS = [copy_everything, copy_data, replace_data, load, assign]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_a_copied_state_gives_the_same_function(way, used):
    source, target = moved(), trained(3, 2)
    if used:
        assert_follows_its_state(target)
    way(source, target)
    torch.testing.assert_close(target(X), source(X), rtol=0, atol=0)
    assert not target.has_uniform_grid
    assert_follows_its_state(target)
    way(trained(3, 2), target)
    assert target.has_uniform_grid
    assert_follows_its_state(target)


@pytest.mark.parametrize("way", [copy_everything, copy_data, load])
def test_writing_the_grid_buffer_changes_the_function(way):
    layer, other = trained(3, 2), moved()
    layer(X)
    for name, value in layer.state_dict().items():
        if name != "grid":
            other.state_dict()[name].copy_(value)
    way(other, layer)
    assert_follows_its_state(layer)


def test_an_average_of_weights_follows_its_buffers():
    layer = trained(3, 2)
    average = AveragedModel(layer, use_buffers=True)
    average(X)
    average.update_parameters(layer)
    layer.update_grid(torch.randn(200, 3))
    average.update_parameters(layer)
    assert_follows_its_state(average.module)


def test_functional_call_uses_the_given_state():
    layer, other = trained(3, 2), moved()
    y = torch.func.functional_call(layer, dict(other.state_dict()), X)
    torch.testing.assert_close(y, other(X), rtol=0, atol=0)
    assert_follows_its_state(layer)


def test_writes_under_inference_mode_are_noticed():
    with torch.inference_mode():
        layer, other = trained(3, 2), moved()
        layer(X)
        copy_everything(other, layer)
        torch.testing.assert_close(layer(X), other(X), rtol=0, atol=0)


def test_a_layer_from_meta_gets_its_grid_with_its_parameters():
    with torch.device("meta"):
        layer = KANLinear(3, 2, grid_range=(-2, 2))
    assert "grid=(-2.0, 2.0)" in repr(layer)
    layer.to_empty(device="cpu")
    layer.grid.fill_(7)
    layer.reset_parameters()
    expected = KANLinear(3, 2, grid_range=(-2, 2))
    assert torch.equal(layer.grid, expected.grid)
    assert layer.has_uniform_grid
    assert_follows_its_state(layer)


def test_reset_parameters_undoes_an_update_of_the_grid():
    layer = moved()
    layer.reset_parameters()
    assert torch.equal(layer.grid, KANLinear(3, 2).grid)


def test_compiled_code_follows_the_knots_without_a_new_graph():
    layer, counter = trained(3, 2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for way in (copy_data, copy_everything, load):
        torch.testing.assert_close(compiled(X), by_reference(layer, X), rtol=1e-5, atol=1e-5)
        way(moved(), layer)
        torch.testing.assert_close(compiled(X), by_reference(layer, X), rtol=1e-5, atol=1e-5)
        way(trained(3, 2), layer)
    assert counter.frame_count == 1


def test_transforms_of_torch_func_follow_the_knots():
    for layer in (trained(3, 2), moved()):
        slopes = torch.func.vmap(torch.func.jacrev(layer))(X[:5])
        expected = [torch.autograd.functional.jacobian(lambda x, m=layer: by_reference(m, x), x) for x in X[:5]]
        torch.testing.assert_close(slopes, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_float64_layers_have_exact_uniform_knots_on_every_backend(monkeypatch):
    layer = trained(3, 2, grid_range=(-1, 0.9)).double()  # the knots had been rounded to float32
    x = torch.randn(50, 3, dtype=torch.float64)
    expected = kan_linear(x, layer.base_weight, layer.scaled_spline_weight, grid_range=(-1, 0.9), backend="torch")
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    monkeypatch.setattr("lesa_kernels.ops.kan_linear.op.choose_backend", lambda *_: "torch")
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


class Comparisons:
    """Counts how often knots are compared."""

    def __init__(self, monkeypatch):
        self.count, compare = 0, uniform.is_uniform

        def counted(*arguments):
            self.count += 1
            return compare(*arguments)

        monkeypatch.setattr(uniform, "is_uniform", counted)


def test_on_a_gpu_knots_are_compared_once_for_each_version(monkeypatch):
    """Comparing waits for the GPU, so knots are only compared again after PyTorch's version counter has changed."""
    monkeypatch.setattr(uniform, "is_visible", lambda grid: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    comparisons, layer = Comparisons(monkeypatch), trained(3, 2)
    for way in (copy_everything, load, assign, replace_data):
        for other in (moved(), trained(3, 2)):
            for _ in range(2):
                layer(X).sum().backward()
            before = comparisons.count
            way(other, layer)
            assert_follows_its_state(layer)
            assert_follows_its_state(layer)
            assert comparisons.count == before + 1


def test_on_a_gpu_knots_that_cannot_be_compared_take_the_general_code(monkeypatch):
    layer = trained(3, 2)
    monkeypatch.setattr(uniform, "is_visible", lambda grid: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    uniform_grid = (3, (-1.0, 1.0))
    comparisons = Comparisons(monkeypatch)
    assert not uniform.runs_uniform(layer.grid, *uniform_grid)  # a graph is being captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.inference_mode():
        grid = layer.grid.clone()
    assert not uniform.runs_uniform(grid, *uniform_grid)  # inference tensors have no version counter
    assert comparisons.count == 0
    assert uniform.runs_uniform(layer.grid, *uniform_grid)
    assert not uniform.runs_uniform(layer.grid, 3, (-1.0, 2.0))
    assert uniform.runs_uniform(layer.grid, *uniform_grid)


def test_nothing_is_cached_for_a_deleted_layer(monkeypatch):
    monkeypatch.setattr(uniform, "is_visible", lambda grid: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = len(uniform.answers)
    layer = trained(3, 2)
    layer(X)
    assert len(uniform.answers) == before + 1
    del layer
    assert len(uniform.answers) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_is_the_same_function(dtype):
    for layer in (trained(3, 2), moved()):
        other = copy.deepcopy(layer).to(dtype)
        assert other.has_uniform_grid == layer.has_uniform_grid
        torch.testing.assert_close(other(X.to(dtype)).float(), layer(X), rtol=0.05, atol=0.05)


def test_the_triton_backend_has_gradients_for_any_knots(device):
    pytest.importorskip("triton")
    from lesa_kernels.ops.kan_linear.op import run_layer

    for layer in (trained(3, 2), moved()):
        layer = layer.to(device)
        x = X.to(device).requires_grad_()
        arguments = {"order": 3, "grid_range": layer.grid_range, "grid": layer.grid, "look": True, "backend": "triton"}
        leaves = [x, layer.base_weight, layer.spline_weight]
        y = run_layer(x, layer.base_weight, layer.scaled_spline_weight, **arguments)
        expected = by_reference(layer, x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        found, wanted = (torch.autograd.grad(r.square().sum(), leaves) for r in (y, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
