"""``fused_output_head`` with ``weights``: the weighted sum of the predictions, against float64 and eager PyTorch."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lesa_kernels.ops.fused_output_head import cpu, reference
from lesa_kernels.ops.fused_output_head.op import fused_output_head, token_means
from tests.lesa_kernels.ops.fused_output_head.test_kernels import (
    BACKENDS,
    DTYPES,
    by_modules,
    in_float64,
    inputs,
    record_table,
)

OPERATION = torch.ops.lesa_kernels.fused_output_head.default
SMALL = {"m": 2, "count": 3, "samples": 2, "tokens": (3,), "channels": 5, "outputs": 3}


@pytest.fixture(params=[*BACKENDS, f"{BACKENDS[1]}, tiled"])
def backend(request, monkeypatch) -> str:
    """The CPU has two code paths. "tiled" uses the one for large inputs, in small tiles, for all sizes."""
    if request.param not in BACKENDS:
        monkeypatch.setattr(cpu, "FEW", 0)
        monkeypatch.setattr(cpu, "SUM_TILE", 1)
        monkeypatch.setattr(cpu, "SUM_TOKENS", 6)
    return request.param.partition(",")[0]


def summed_inputs(m=3, count=20, *shape, **options) -> tuple[list[Tensor], Tensor]:
    """The positional arguments, and the weights: lengths of substeps, of which one is negative and one zero."""
    arguments = inputs(m, count, *shape, **options)
    weights = torch.rand_like(arguments[2]) / count
    if count > 2:
        weights[0], weights[1] = -weights[0], 0
    return arguments, weights


def summed(weights: Tensor, outputs: Tensor) -> Tensor:
    return torch.tensordot(weights.to(outputs.dtype), outputs, 1)


def assert_accurate(result: Tensor, arguments: list[Tensor], weights: Tensor, eps: float = 1e-6) -> None:
    exact = summed(weights, in_float64(*arguments, eps=eps))
    wide = torch.promote_types(result.dtype, torch.float32)
    eager = summed(weights, by_modules(*arguments, eps=eps).to(wide)).to(result.dtype)
    assert result.shape == exact.shape
    assert result.dtype == arguments[0].dtype
    error, allowed = ((y.double() - exact).norm() for y in (result, eager))
    assert not error > 2 * allowed + 1e-6 * exact.norm()
    assert result.isfinite().all()


def test_reference_and_backends_match_the_definition(device) -> None:
    for tokens in ((), (5,), (3, 4)):
        arguments, weights = summed_inputs(tokens=tokens, dtype=torch.float64, device=device)
        expected = summed(weights, in_float64(*arguments))
        result = reference.fused_output_head(*arguments, 1e-6, weights)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        for backend in BACKENDS:
            result = fused_output_head(*arguments, weights=weights, backend=backend)
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 64, "outputs": 16},
        {"channels": 72, "outputs": 6},
        {"channels": 71, "outputs": 5},
        {"modulated": 1},
        {"m": 12, "count": 5},
        {"tokens": (3, 5), "samples": 1},
        {"tokens": ()},
    ],
    ids=str,
)
def test_matches_float64(shape, dtype, backend, device) -> None:
    arguments, weights = summed_inputs(**shape, dtype=dtype, device=device)
    assert_accurate(fused_output_head(*arguments, weights=weights, backend=backend), arguments, weights)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("m", "count", "outputs"), [(1, 1, 4), (2, 1, 3), (16, 9, 17), (2, 7, 1), (3, 200, 4), (8, 20, 64), (16, 3, 384)]
)
def test_any_number_of_features_predictions_and_outputs(m, count, outputs, backend, device) -> None:
    for tokens, samples in ((5, 1), (1, 1), (1, 3)):
        arguments, weights = summed_inputs(m, count, samples, (tokens,), 64, outputs, dtype=torch.bfloat16)
        arguments, weights = [t.to(device) for t in arguments], weights.to(device)
        assert_accurate(fused_output_head(*arguments, weights=weights, backend=backend), arguments, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_prediction_with_weight_one_is_that_prediction(dtype, backend, device) -> None:
    arguments = inputs(count=1, dtype=dtype, device=device)
    result = fused_output_head(*arguments, weights=torch.ones_like(arguments[2]), backend=backend)
    expected = fused_output_head(*arguments, backend=backend)[0]
    torch.testing.assert_close(result, expected)  # a compiler may contract one of them to a fused multiply-add


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["common-mean", "tiny", "huge", "constant", "zero"])
def test_extreme_features_match_float64(case, dtype, backend, device) -> None:
    (history, *rest), weights = summed_inputs(4, 20, 1, (17,), 192, dtype=dtype, device=device)
    values = {"common-mean": 100 + 0.1 * history, "tiny": 1e-4 * history, "huge": 1e4 * history}
    values |= {"constant": torch.full_like(history, 3), "zero": torch.zeros_like(history)}
    history = values[case]
    for means in (None, token_means(history)):
        result = fused_output_head(history, *rest, means=means, weights=weights, backend=backend)
        assert_accurate(result, [history, *rest], weights)


def test_large_coefficients_that_cancel(backend, device) -> None:
    for count in (2, 20):
        (history, coefficients, *rest), weights = summed_inputs(8, count, 1, (17,), 192, device=device)
        history = history[:1] + 0.05 * history
        coefficients = 20 * (coefficients - coefficients.mean(1, keepdim=True)) + 1 / 8
        arguments = [history, coefficients, *rest]
        assert_accurate(fused_output_head(*arguments, weights=weights, backend=backend), arguments, weights)


def test_centred_features_and_optional_arguments(backend, device) -> None:
    (history, coefficients, _, multiplier, addend, weight, _), weights = summed_inputs(device=device)
    arguments = [history + 100, coefficients, None, multiplier, addend, weight, None]
    centred = history - history.mean(-1, keepdim=True)
    result = fused_output_head(centred, *arguments[1:], eps=0.5, centred=True, weights=weights, backend=backend)
    assert_accurate(result, arguments, weights, eps=0.5)


def test_modulation_may_be_shared_in_part_and_all_arguments_may_be_views(backend, device) -> None:
    (history, coefficients, bias, multiplier, addend, weight, offset), weights = summed_inputs(
        dtype=torch.bfloat16, device=device
    )
    history = history.repeat_interleave(2, 0)[::2]
    coefficients, weight = coefficients.T.contiguous().T, weight.T.contiguous().T
    strided = weights.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    for scale, shift in ((multiplier[:, :1], addend), (multiplier, addend[:, :1]), (multiplier.bfloat16(), addend)):
        result = fused_output_head(
            history, coefficients, bias, scale, shift, weight, offset, weights=strided, backend=backend
        )
        expanded = (t.expand_as(addend).contiguous() for t in (scale, shift))
        assert_accurate(result, [history, coefficients, bias, *expanded, weight, offset], weights)


@pytest.mark.parametrize("empty", [{"count": 0}, {"samples": 0}, {"tokens": (0,)}, {"outputs": 0}], ids=str)
def test_a_sum_of_no_predictions_is_zero_and_other_empty_results_stay_empty(empty, backend, device) -> None:
    arguments, weights = summed_inputs(**empty, device=device)
    tensors = [t.requires_grad_() for t in (*arguments, weights)]
    result = fused_output_head(*arguments, weights=weights, backend=backend)
    assert result.shape == (*arguments[0].shape[1:-1], len(arguments[5]))
    assert not result.any()
    result.sum().backward()
    assert not any(t.grad.any() for t in tensors)


def test_results_are_reproducible_and_shards_of_the_tokens_are_independent(backend, device) -> None:
    (history, *rest), weights = summed_inputs(tokens=(37,), dtype=torch.bfloat16, device=device)
    whole = fused_output_head(history, *rest, weights=weights, backend=backend)
    assert torch.equal(whole, fused_output_head(history, *rest, weights=weights, backend=backend))
    shard = fused_output_head(history[:, :, 5:20].contiguous(), *rest, weights=weights, backend=backend)
    torch.testing.assert_close(shard, whole[:, 5:20])


def test_no_access_is_out_of_bounds(device, monkeypatch) -> None:
    if device.type == "cuda":
        pytest.skip("needs the interpreter")
    record_table(monkeypatch)
    from tests.lesa_kernels.memcheck import memcheck

    for shape in ((3, 7, 2, (20,), 72, 6), (2, 1, 1, (17,), 71, 5), (16, 3, 2, (5,), 64, 200)):
        (history, coefficients, _, multiplier, addend, weight, offset), weights = summed_inputs(
            *shape, dtype=torch.bfloat16
        )
        tensors, means = (history, coefficients, None, multiplier, addend, weight, offset), token_means(history)
        with memcheck(history, coefficients, multiplier, weight, means, weights):
            fused_output_head(*tensors, means=means, weights=weights, backend="triton")


@pytest.mark.parametrize("modulated", [1, 2])
def test_gradients_match_finite_differences_twice(modulated) -> None:
    arguments, weights = summed_inputs(**SMALL, modulated=modulated, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (*arguments, weights)]

    def apply(*tensors):
        return fused_output_head(*tensors[:7], weights=tensors[7])

    assert gradcheck(lambda *t: reference.fused_output_head(*t[:7], 1e-6, t[7]), tensors, fast_mode=True)
    assert gradcheck(apply, tensors, fast_mode=True)
    assert gradgradcheck(apply, tensors, fast_mode=True)
    assert gradcheck(lambda w: fused_output_head(*(t.detach() for t in arguments), weights=w), (weights,))


@pytest.mark.parametrize("chosen", BACKENDS)
def test_gradients_are_those_of_the_reference(chosen, device) -> None:
    arguments, weights = summed_inputs(dtype=torch.bfloat16, device=device)
    tensors = [t.requires_grad_() for t in (*arguments, weights)]
    grad = torch.randn(2, 20, 6, device=device).bfloat16()
    results = torch.autograd.grad(fused_output_head(*arguments, weights=weights, backend=chosen), tensors, grad)
    expected = torch.autograd.grad(reference.fused_output_head(*arguments, 1e-6, weights), tensors, grad)
    for result, plain, tensor in zip(results, expected, tensors, strict=True):
        assert result.dtype == tensor.dtype
        torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_operation(dtype, triton, device) -> None:
    (history, coefficients, _, *rest), weights = summed_inputs(dtype=dtype, device=device)
    means = token_means(history)
    torch.library.opcheck(OPERATION, (history, coefficients, *rest, weights, means, 1e-6, False, triton))
    torch.library.opcheck(OPERATION, (history, coefficients, *rest[:3], None, weights, None, 1e-6, True, triton))


def test_compiles_without_graph_breaks_and_fake_cuda_tensors_need_no_gpu() -> None:
    arguments, weights = summed_inputs()
    compiled = torch.compile(lambda w: fused_output_head(*arguments, weights=w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights), fused_output_head(*arguments, weights=weights))
    with FakeTensorMode():
        arguments = inputs(dtype=torch.bfloat16, device="cuda")
        result = fused_output_head(*arguments, weights=arguments[2])
        assert (result.shape, result.dtype, result.device.type) == ((2, 20, 6), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend, device) -> None:
    arguments, weights = summed_inputs(dtype=dtype, device=device)
    plain = fused_output_head(*arguments, weights=weights, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(fused_output_head(*arguments, weights=weights, backend=backend), plain)


def test_one_image_on_a_cpu_runs_seven_operators() -> None:
    arguments, weights = summed_inputs(3, 20, 1, (16,), 96, 4, modulated=1)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused_output_head(*arguments, centred=True, weights=weights)
    calculations = {"aten::mm", "aten::addmm", "aten::mv", "aten::native_layer_norm", "aten::addcmul", "aten::mul"}
    calculations |= {"aten::sum", "aten::mean"}
    assert [e.name for e in profile.events() if e.name in calculations] == [
        "aten::sum",
        "aten::mul",
        "aten::mm",
        "aten::native_layer_norm",
        "aten::addcmul",
        "aten::mv",
        "aten::addmm",
    ]


def test_the_cpu_path_allocates_only_tiles_and_the_result() -> None:
    arguments, weights = summed_inputs(4, 100, 64, (64,), 96, 4, modulated=1)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        fused_output_head(*arguments, weights=weights)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= 8 * cpu.SUM_TILE + 2**16
    assert largest < 64 * 64 * 100 * 4 * 4  # as all outputs in float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(3), r"weights are torch.float32 \[3\], they must be torch.float32 \[2\]"),
        (torch.ones(2, 1), r"weights are torch.float32 \[2, 1\]"),
        (torch.ones(2, dtype=torch.float64), r"weights are torch.float64 \[2\], they must be torch.float32"),
        (torch.ones(2, device="meta"), "weights is on meta"),
        (torch.ones(2, dtype=torch.int64), "weights is torch.int64"),
        ([1.0, 1.0], "weights must be a tensor, not a list"),
    ],
    ids=str,
)
def test_wrong_weights_are_named(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused_output_head(*inputs(), weights=wrong)
