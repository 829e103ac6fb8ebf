"""``kan_linear`` as an operation of PyTorch: compilation, export, autocast, fake tensors, errors."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from lesa_kernels import KANLinear, kan_linear

pytest.importorskip("triton")
OPS = torch.ops.lesa_kernels
GRID = (3, -3.0, 3.0)


def arguments(device="cpu", dtype=torch.float32, gradients=False):
    shapes = (4, 5, 3), (2, 3), (2, 3, 8)
    return [torch.randn(s, device=device).to(dtype).requires_grad_(gradients) for s in shapes]


@pytest.mark.parametrize("triton", [True, False])
def test_opcheck(triton, device):
    x, base, spline = arguments(device)
    options = (*GRID, None if triton else torch.linspace(-4, 4, 12, device=device).repeat(3, 1), triton)
    for x_ in (x, x[:0], x.transpose(0, 1), x[0, 0]):
        dy = torch.randn(*x_.shape[:-1], 2, device=device)
        opcheck(OPS.kan_linear.default, (x_, base, spline, *options))
        opcheck(OPS.kan_linear_input_gradient.default, (dy, x_, base, spline, *options))
        opcheck(OPS.kan_linear_weight_gradients.default, (dy, x_, 8, *options))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_in_one_graph_forward_and_backward(backend, device):
    tensors = arguments(device, gradients=True)

    def loss(*tensors):
        return kan_linear(*tensors, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_by_inductor(device):
    tensors = arguments(device, gradients=True)
    layer = torch.compile(lambda *t: kan_linear(*t, backend="triton").sin(), fullgraph=True)
    ours = layer(*tensors)
    expected = kan_linear(*tensors, backend="triton").sin()
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layer(*tensors), expected)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_new_batch_sizes_compile_no_new_graphs(backend, device):
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(lambda *t: kan_linear(*t, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    _, base, spline = arguments(device)
    graphs = []
    for rows in (5, 7, 11, 64):
        x = torch.randn(rows, 3, device=device)
        torch.testing.assert_close(layer(x, base, spline), kan_linear(x, base, spline, backend="torch"))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_the_module_compiles(device):
    layer = KANLinear(3, 2).to(device)
    x = torch.randn(4, 3, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.update_grid(x)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_export_keeps_one_operation(backend, device):
    class Layer(torch.nn.Module):
        def forward(self, x, base, spline):
            return kan_linear(x, base, spline, backend=backend)

    tensors = arguments(device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Layer(), tuple(tensors), dynamic_shapes=({0: rows}, None, None))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPS.kan_linear.default in calls
    more = torch.randn(7, 5, 3, device=device)
    torch.testing.assert_close(program.module()(more, *tensors[1:]), kan_linear(more, *tensors[1:], backend="torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_autocast_casts_all_three_together(backend, dtype, device):
    tensors = arguments(device, gradients=True)
    tensors[0] = (
        tensors[0].detach().to(torch.bfloat16).requires_grad_()
    )  # like the output of an earlier layer under autocast
    with torch.autocast(device.type, dtype):
        y = kan_linear(*tensors, backend=backend)
    expected = kan_linear(*(t.to(dtype) for t in tensors), backend=backend)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]


def test_autocast_leaves_float64_alone(device):
    tensors = arguments(device, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert kan_linear(*tensors).dtype == torch.float64


def test_fake_tensors_on_a_gpu_need_no_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        x, base, spline = arguments("cuda", torch.bfloat16)
        y = kan_linear(x, base, spline)
        dx = OPS.kan_linear_input_gradient(y, x, base, spline, *GRID)
        d_base, d_spline = OPS.kan_linear_weight_gradients(y, x, 8, *GRID)
    for result, shape in ((y, (4, 5, 2)), (dx, x.shape), (d_base, base.shape), (d_spline, spline.shape)):
        assert (result.device.type, result.dtype, result.shape) == ("cuda", torch.bfloat16, shape)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 4)}, "x is"),
        ({"x": torch.zeros(())}, "x is"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "float"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, "dtype"),
        ({"base_weight": torch.zeros(5, 3)}, "spline_weight"),
        ({"base_weight": torch.zeros(3)}, "base_weight"),
        ({"spline_weight": torch.zeros(2, 24)}, "spline_weight"),
        ({"spline_weight": torch.zeros(2, 3, 3)}, "grid_size"),
        ({"order": -1}, "order"),
        ({"grid_range": (3.0, -3.0)}, "grid_range"),
        ({"grid": torch.zeros(3, 11)}, "grid"),
        ({"backend": "cuda"}, "backend"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message, backend):
    x, base, spline = arguments()
    call = {"x": x, "base_weight": base, "spline_weight": spline, "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        kan_linear(**call)


def test_kan_linear_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, lesa_kernels
tensors = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2, 3, 8)
direct = torch.ops.lesa_kernels.kan_linear(*tensors, 3, -3.0, 3.0)
assert torch.equal(lesa_kernels.kan_linear(*tensors), direct)
try:
    lesa_kernels.kan_linear(*tensors, backend="triton")
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
