"""``fused_output_head`` as an operation of PyTorch: gradients, fake tensors, compilation, export and autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lesa_kernels.ops.fused_output_head import cpu, reference
from lesa_kernels.ops.fused_output_head.op import fused_output_head, token_means
from tests.lesa_kernels.ops.fused_output_head.test_kernels import BACKENDS, DTYPES, inputs

OPERATION = torch.ops.lesa_kernels.fused_output_head.default
SMALL = {"m": 2, "count": 2, "samples": 2, "tokens": (3,), "channels": 5, "outputs": 3}


@pytest.mark.parametrize("modulated", [1, 2])
def test_gradients_match_finite_differences_twice(modulated) -> None:
    tensors = [t.requires_grad_() for t in inputs(**SMALL, modulated=modulated, dtype=torch.float64)]
    assert gradcheck(lambda *t: reference.fused_output_head(*t, 1e-6), tensors, fast_mode=True)
    assert gradcheck(fused_output_head, tensors, fast_mode=True)
    assert gradgradcheck(fused_output_head, tensors, fast_mode=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(dtype, backend, device) -> None:
    tensors = [t.requires_grad_() for t in inputs(dtype=dtype, device=device)]
    grad = torch.randn(2, 2, 20, 6, device=device).to(dtype)
    results = torch.autograd.grad(fused_output_head(*tensors, backend=backend), tensors, grad)
    expected = torch.autograd.grad(reference.fused_output_head(*tensors, 1e-6), tensors, grad)
    for result, plain, tensor in zip(results, expected, tensors, strict=True):
        assert result.dtype == tensor.dtype
        torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("needed", [(0,), (2,), (3, 5), (1, 6)], ids=str)
def test_only_wanted_gradients_are_computed(needed, device) -> None:
    tensors = [t.requires_grad_(i in needed) for i, t in enumerate(inputs(device=device))]
    fused_output_head(*tensors, backend="triton").sum().backward()
    assert [t.grad is not None for t in tensors] == [i in needed for i in range(7)]


def test_arguments_may_depend_on_each_other() -> None:
    history, coefficients, bias, multiplier, _, weight, offset = inputs(**SMALL, dtype=torch.float64)

    def chained(multiplier):
        return fused_output_head(history, coefficients, bias, multiplier, multiplier.sin(), weight, offset)

    assert gradcheck(chained, (multiplier.requires_grad_(),))
    assert gradgradcheck(chained, (multiplier,))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_operation(dtype, triton, device) -> None:
    history, coefficients, _, *rest = inputs(dtype=dtype, device=device)
    torch.library.opcheck(OPERATION, (history, coefficients, *rest, None, token_means(history), 1e-6, False, triton))
    torch.library.opcheck(OPERATION, (history, coefficients, *rest[:3], None, None, None, 1e-6, True, triton))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks_to_the_same_gradients(backend, device) -> None:
    def step(history, *rest):
        return fused_output_head(history * 2, *rest, backend=backend).sin()

    tensors = [t.requires_grad_() for t in inputs(device=device)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, expected in zip(
        (compiled(*tensors), *torch.autograd.grad(compiled(*tensors).sum(), tensors)),
        (step(*tensors), *torch.autograd.grad(step(*tensors).sum(), tensors)),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


def test_exported_programs_keep_the_operation() -> None:
    class Step(torch.nn.Module):
        def forward(self, history, *rest):
            return fused_output_head(history, *rest, means=token_means(history))

    tensors = tuple(inputs())
    program = torch.export.export(Step(), tensors)
    assert [node.target for node in program.graph.nodes].count(OPERATION) == 1
    assert torch.equal(program.module()(*tensors), Step()(*tensors))


def test_fake_cuda_tensors_need_no_gpu() -> None:
    with FakeTensorMode():
        history, *rest = inputs(dtype=torch.bfloat16, device="cuda")
        result = fused_output_head(history, *rest, means=token_means(history))
        assert (result.shape, result.dtype, result.device.type) == ((2, 2, 20, 6), torch.bfloat16, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend, device, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "FEW", 0)
    monkeypatch.setattr(cpu, "TILE", 1000)
    tensors = [t.requires_grad_() for t in inputs(dtype=dtype, device=device)]
    plain = fused_output_head(*tensors, backend=backend)
    gradients = torch.autograd.grad(plain.float().sum(), tensors)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = fused_output_head(*tensors, backend=backend)
        assert torch.equal(result, plain)
        if backend != "torch":  # plain PyTorch, whose products autocast rounds in the backward pass too
            for a, b in zip(torch.autograd.grad(result.float().sum(), tensors), gradients, strict=True):
                assert torch.equal(a, b)


def test_one_image_on_a_cpu_runs_four_operators() -> None:
    tensors = inputs(10, 6, 1, (16,), 96, 4)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused_output_head(*tensors, centred=True)
    calculations = {"aten::mm", "aten::addmm", "aten::native_layer_norm", "aten::addcmul", "aten::mul", "aten::mean"}
    assert [e.name for e in profile.events() if e.name in calculations] == [
        "aten::mm",
        "aten::native_layer_norm",
        "aten::addcmul",
        "aten::addmm",
    ]


def test_the_cpu_path_allocates_only_tiles_and_the_result(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "TILE", 1 << 19)
    history, *rest = inputs(10, 6, 64, (64,), 96, 4)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        fused_output_head(history, *rest)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert history.nbytes > 7 * largest
    assert largest <= 4 * cpu.TILE + 2**16
