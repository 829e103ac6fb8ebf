"""``combine`` as an operation of PyTorch: gradients, fake tensors, compilation, export and autocast."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lesa_kernels import combine, gram_row
from lesa_kernels.ops.combine import reference
from tests.lesa_kernels.ops.combine.test_kernels import CHANNELS, DTYPES, FEATURE, inputs

BACKENDS = ["triton", "torch" if torch.cuda.is_available() else "native"]
OPS = torch.ops.lesa_kernels


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
def test_reference_gradients_match_finite_differences(channels) -> None:
    tensors = [t.double().requires_grad_() for t in inputs(3, 2, (2, 3, 24), channels)]
    assert gradcheck(reference.combine, tensors, fast_mode=True)
    history, grad = tensors[0].detach(), torch.randn(2, 2, 3, 24, dtype=torch.float64)
    coefficients, bias = tensors[1:]
    expected = torch.autograd.grad(reference.combine(history, coefficients, bias), (coefficients, bias), grad)
    torch.testing.assert_close(reference.gradients(grad, history, channels), expected)


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
def test_combine_is_twice_differentiable(channels) -> None:
    tensors = [t.double().requires_grad_() for t in inputs(3, 2, (2, 3, 24), channels)]
    assert gradcheck(combine, tensors, fast_mode=True)
    assert gradgradcheck(combine, tensors, fast_mode=True)


@pytest.mark.parametrize("layout", ["shared", "channel", "sample"])
def test_gradients_of_kernel_gradients_match_the_reference(layout, device) -> None:
    tensors = [t.requires_grad_() for t in inputs(3, 2, FEATURE, CHANNELS[layout], device=device)]
    second = []
    for backend in BACKENDS:
        first = torch.autograd.grad(combine(*tensors, backend=backend).square().sum(), tensors, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for kernel, plain in zip(*second, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-3)


# Cases of several blocks take a second each in Triton's interpreter, so they run in float32 only unless full.
SMALL = [
    ("shared", (2, 3, 24), 5, 3),
    ("shared", (2, 3, 25), 5, 3),
    ("channel", (3, 25), 5, 2),
    ("sample", (2, 3, 24), 5, 3),
    ("token", (2, 3, 24), 5, 3),
]
SEVERAL_BLOCKS = [("shared", (3 * 1024 + 8,), 7, 13), ("channel", (2, 9, 24), 3, 5)]
GRADIENTS = [
    pytest.param(*case, dtype, marks=[pytest.mark.full] if case in SEVERAL_BLOCKS and dtype != torch.float32 else [])
    for case in SMALL + SEVERAL_BLOCKS
    for dtype in DTYPES
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layout", "feature", "m", "count", "dtype"), GRADIENTS)
def test_gradients_match_float64(layout, feature, m, count, dtype, backend, device) -> None:
    channels = {"channel": (*(1,) * (len(feature) - 1), feature[-1]), "token": (1, 3, 1), "sample": (2, 1, 1)}
    tensors = inputs(m, count, feature, channels.get(layout, ()), dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn(count, *feature, device=device).to(dtype)
    results = torch.autograd.grad(combine(*leaves, backend=backend), leaves, grad)
    again = torch.autograd.grad(combine(*leaves, backend=backend), leaves, grad)
    eager = torch.autograd.grad(reference.combine(*leaves), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(reference.combine(*wide), wide, grad.double())
    for result, repeated, plain, exact, leaf in zip(results, again, eager, expected, leaves, strict=True):
        assert result.dtype == leaf.dtype
        assert torch.equal(result, repeated)
        floor = 2e-6 * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_wanted_gradients_are_computed(needed, device) -> None:
    tensors = [t.requires_grad_(i in needed) for i, t in enumerate(inputs(3, 2, FEATURE, device=device))]
    combine(*tensors, backend="triton").sum().backward()
    assert [t.grad is not None for t in tensors] == [i in needed for i in range(3)]


@pytest.mark.parametrize(
    ("layout", "triton"), [("shared", True), ("channel", True), ("shared", False), ("channel", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_all_operations(dtype, layout, triton, device) -> None:
    history, coefficients, bias = inputs(3, 2, FEATURE, CHANNELS[layout], dtype, device)
    out = torch.zeros(2, *FEATURE, dtype=dtype, device=device)
    torch.library.opcheck(OPS.combine, (history, coefficients, bias, triton))
    torch.library.opcheck(OPS.combine, (history, coefficients, None, triton))
    torch.library.opcheck(OPS.combine_out, (out, history, coefficients, bias, triton))
    torch.library.opcheck(OPS.combine_gradients, (out, history, CHANNELS[layout], triton))
    torch.library.opcheck(OPS.gram_row, (history, history[1], triton))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["shared", "channel"])
def test_compiles_without_graph_breaks_to_the_same_gradients(layout, backend, device) -> None:
    def step(history, coefficients, bias):
        return combine(history * 2, coefficients, bias, backend=backend).sin()

    tensors = [t.requires_grad_() for t in inputs(3, 2, FEATURE, CHANNELS[layout], device=device)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, expected in zip(
        (compiled(*tensors), *torch.autograd.grad(compiled(*tensors).sum(), tensors)),
        (step(*tensors), *torch.autograd.grad(step(*tensors).sum(), tensors)),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


def test_compiled_backward_runs_the_kernel(device) -> None:
    graphs = []

    def record(graph, _):
        graphs.append({node.target for node in graph.graph.nodes})
        return make_boxed_func(graph)

    step = torch.compile(
        lambda *tensors: combine(*tensors, backend="triton"),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
    )
    tensors = [t.requires_grad_() for t in inputs(3, 2, FEATURE, device=device)]
    step(*tensors).sum().backward()
    forward, backward = graphs
    assert OPS.combine.default in forward
    assert {OPS.combine.default, OPS.combine_gradients.default} <= backward


def test_a_compiled_step_writes_into_out(device) -> None:
    history, coefficients, bias = inputs(3, 2, FEATURE, device=device)
    out = torch.zeros(2, *FEATURE, device=device)
    step = torch.compile(
        lambda *tensors, out: combine(*tensors, out=out, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    step(history, coefficients, bias, out=out)
    assert torch.equal(out, combine(history, coefficients, bias, backend="triton"))


def test_exported_programs_keep_the_operation() -> None:
    class Step(torch.nn.Module):
        def forward(self, history, coefficients, bias):
            return combine(history, coefficients, bias), gram_row(history, history[0])

    tensors = inputs(3, 2, FEATURE)
    program = torch.export.export(Step(), tensors)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(OPS.combine.default) == targets.count(OPS.gram_row.default) == 1
    for result, expected in zip(program.module()(*tensors), Step()(*tensors), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("layout", ["shared", "channel"])
def test_fake_cuda_tensors_need_no_gpu(layout) -> None:
    with FakeTensorMode():
        history, coefficients, bias = inputs(3, 2, FEATURE, CHANNELS[layout], torch.bfloat16, "cuda")
        feature = torch.empty(FEATURE, dtype=torch.bfloat16, device="cuda")
        results = combine(history, coefficients, bias), gram_row(history, feature)
        assert [(r.shape, r.dtype, r.device.type) for r in results] == [
            ((2, *FEATURE), torch.bfloat16, "cuda"),
            ((3,), torch.float64, "cuda"),
        ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["shared", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, layout, backend, device) -> None:
    tensors = inputs(3, 4, FEATURE, CHANNELS[layout], dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    plain = combine(*leaves, backend=backend)
    gradients = torch.autograd.grad(plain.float().sum(), leaves)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = combine(*leaves, backend=backend)
        assert torch.equal(result, plain)
        for a, b in zip(torch.autograd.grad(result.float().sum(), leaves), gradients, strict=True):
            assert torch.equal(a, b)
