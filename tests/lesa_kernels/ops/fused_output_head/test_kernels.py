"""The results of ``fused_output_head``, against float64 and against PyTorch's modules in the same dtype."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lesa_kernels import combine
from lesa_kernels.ops.fused_output_head import cpu, reference
from lesa_kernels.ops.fused_output_head.op import fused_output_head, token_means

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["triton", "torch" if torch.cuda.is_available() else "native"]


@pytest.fixture(params=[*BACKENDS, f"{BACKENDS[1]}, tiled"])
def backend(request, monkeypatch) -> str:
    """The CPU has two code paths. "tiled" uses the one for large inputs for all sizes."""
    if request.param not in BACKENDS:
        monkeypatch.setattr(cpu, "FEW", 0)
    return request.param.partition(",")[0]


def inputs(
    m=3, count=2, samples=2, tokens=(20,), channels=72, outputs=6, *, modulated=None, dtype=torch.float32, device="cpu"
) -> list[Tensor]:
    """history, coefficients, bias, multiplier, addend, weight, projection_bias."""
    modulated = samples if modulated is None else modulated
    exact = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(m, samples, *tokens, channels, device=device).to(dtype),
        torch.randn(count, m, device=device, dtype=exact),
        torch.randn(count, device=device, dtype=exact),
        1 + 0.3 * torch.randn(count, modulated, channels, device=device, dtype=exact),
        torch.randn(count, modulated, channels, device=device, dtype=exact),
        torch.randn(outputs, channels, device=device).to(dtype) / max(1, channels) ** 0.5,
        torch.randn(outputs, device=device).to(dtype),
    ]


def by_modules(history, coefficients, bias, multiplier, addend, weight, projection_bias, eps=1e-6) -> Tensor:
    """The same computation by PyTorch's modules, in the dtype of the history, as in a model."""
    rows = len(coefficients), multiplier.shape[1], *(1,) * (history.ndim - 3), history.shape[-1]
    scale, shift = (t.to(history.dtype).view(rows) for t in (multiplier, addend))
    x = combine(history, coefficients, bias, backend="torch")
    return functional.linear(functional.layer_norm(x, x.shape[-1:], eps=eps) * scale + shift, weight, projection_bias)


def in_float64(history, coefficients, bias, multiplier, addend, weight, projection_bias, eps=1e-6) -> Tensor:
    """The definition in float64, written independently of the reference."""
    h, c, scale, shift, w = (t.double() for t in (history, coefficients, multiplier, addend, weight))
    x = torch.tensordot(c, h, 1)
    if bias is not None:
        x += bias.double().view(-1, *(1,) * (h.ndim - 1))
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    flat = x.flatten(2, -2) if h.ndim > 3 else x.unsqueeze(2)
    result = torch.einsum("pbtd,od->pbto", flat * scale.unsqueeze(2) + shift.unsqueeze(2), w)
    if projection_bias is not None:
        result += projection_bias.double()
    return result.view(*x.shape[:-1], len(w))


def assert_accurate(result: Tensor, *arguments: Tensor | None, eps: float = 1e-6) -> None:
    exact, eager = in_float64(*arguments, eps=eps), by_modules(*arguments, eps=eps)
    assert result.shape == exact.shape
    assert result.dtype == arguments[0].dtype
    error, allowed = ((y.double() - exact).norm() for y in (result, eager))
    assert (
        not error > 2 * allowed + 1e-6 * exact.norm()
    )  # the modules may overflow in fp16: then any finite result is accepted
    assert result.isfinite().all()


def test_reference_and_backends_match_the_definition(device) -> None:
    for tokens in ((), (5,), (3, 4)):
        arguments = inputs(tokens=tokens, dtype=torch.float64, device=device)
        expected = in_float64(*arguments)
        torch.testing.assert_close(reference.fused_output_head(*arguments, 1e-6), expected, rtol=1e-12, atol=1e-12)
        for backend in BACKENDS:
            torch.testing.assert_close(fused_output_head(*arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 64, "outputs": 16},
        {"channels": 72, "outputs": 6},  # the last block of channels is not full
        {"channels": 71, "outputs": 5},  # and rows are not aligned
        {"modulated": 1},
        {"tokens": (3, 5), "samples": 1},
        {"tokens": ()},
    ],
    ids=str,
)
def test_matches_float64(shape, dtype, backend, device) -> None:
    arguments = inputs(**shape, dtype=dtype, device=device)
    assert_accurate(fused_output_head(*arguments, backend=backend), *arguments)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("m", "count", "outputs"), [(1, 1, 4), (16, 9, 17), (2, 7, 1), (8, 6, 64), (16, 3, 384)])
def test_any_number_of_features_predictions_and_outputs(m, count, outputs, backend, device) -> None:
    arguments = inputs(m, count, 1, (5,), 64, outputs, dtype=torch.bfloat16, device=device)
    assert_accurate(fused_output_head(*arguments, backend=backend), *arguments)


@pytest.mark.parametrize("outputs", [385, 600])
def test_too_many_outputs_or_features_run_on_the_reference(outputs, device) -> None:
    arguments = inputs(17, outputs=outputs, device=device)
    assert torch.equal(fused_output_head(*arguments, backend="triton"), reference.fused_output_head(*arguments, 1e-6))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["common-mean", "tiny", "huge", "constant", "zero"])
def test_extreme_features_match_float64(case, dtype, backend, device) -> None:
    history, *rest = inputs(4, 2, 1, (17,), 192, dtype=dtype, device=device)
    values = {"common-mean": 100 + 0.1 * history, "tiny": 1e-4 * history, "huge": 1e4 * history}
    values |= {"constant": torch.full_like(history, 3), "zero": torch.zeros_like(history)}
    history = values[case]
    for means in (None, token_means(history)):
        assert_accurate(fused_output_head(history, *rest, means=means, backend=backend), history, *rest)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("common", [0, 100])
def test_centred_features_give_the_same_outputs(common, backend, device) -> None:
    history, *rest = inputs(4, 2, 2, (17,), 192, device=device)
    history += common
    centred = history - history.mean(-1, keepdim=True)
    assert_accurate(fused_output_head(centred, *rest, centred=True, backend=backend), history, *rest)


def test_large_coefficients_that_cancel(backend, device) -> None:
    history, coefficients, *rest = inputs(8, 2, 1, (17,), 192, device=device)
    history = history[:1] + 0.05 * history
    coefficients = 20 * (coefficients - coefficients.mean(1, keepdim=True)) + 1 / 8
    assert_accurate(fused_output_head(history, coefficients, *rest, backend=backend), history, coefficients, *rest)


def test_eps_and_optional_arguments(backend, device) -> None:
    history, coefficients, _, multiplier, addend, weight, _ = inputs(device=device)
    arguments = history, coefficients, None, multiplier, addend, weight, None
    assert_accurate(fused_output_head(*arguments, eps=0.5, backend=backend), *arguments, eps=0.5)


def test_modulation_may_have_the_dtype_of_the_history_and_be_shared(backend, device) -> None:
    history, coefficients, bias, multiplier, addend, *rest = inputs(dtype=torch.bfloat16, device=device)
    arguments = history, coefficients, bias, multiplier.bfloat16(), addend.bfloat16(), *rest
    assert_accurate(fused_output_head(*arguments, backend=backend), *arguments)
    one = history, coefficients, bias, multiplier[:, :1], addend, *rest
    both = history, coefficients, bias, multiplier[:, :1].expand(-1, 2, -1), addend, *rest
    assert torch.equal(fused_output_head(*one, backend=backend), fused_output_head(*both, backend=backend))


VIEWS = {
    "every-other-row": lambda t: t[::2],
    "one-row-repeated": lambda t: t[:1].expand(4, -1, -1, -1),
    "misaligned": lambda t: t.view(-1)[3 : 3 + 4 * 64 * 6].view(4, 2, 3, 64),
    "transposed": lambda t: t.transpose(1, 2),
    "expanded": lambda t: t[..., :1].expand(-1, -1, -1, 64) + torch.arange(64, device=t.device).to(t.dtype),
    "columns": lambda t: t[..., 1:33],
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("view", VIEWS)
def test_all_arguments_may_be_any_view(view, backend, device) -> None:
    history = VIEWS[view](torch.randn(8, 2, 3, 64, device=device).bfloat16())
    m, samples, tokens, channels = history.shape
    _, coefficients, bias, multiplier, addend, weight, offset = inputs(
        m, 2, samples, (tokens,), channels, dtype=torch.bfloat16, device=device
    )
    arguments = (
        history,
        coefficients.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        multiplier.transpose(0, 1).contiguous().transpose(0, 1),
        addend[:, :1].expand(-1, samples, -1),
        weight.T.contiguous().T,
        offset,
    )
    assert_accurate(fused_output_head(*arguments, backend=backend), *arguments)


@pytest.mark.parametrize("empty", [{"count": 0}, {"samples": 0}, {"tokens": (0,)}, {"outputs": 0}], ids=str)
def test_empty_arguments_give_empty_results(empty, backend, device) -> None:
    arguments = [t.requires_grad_() for t in inputs(**empty, device=device)]
    result = fused_output_head(*arguments, backend=backend)
    assert result.shape == (len(arguments[1]), *arguments[0].shape[1:-1], len(arguments[5]))
    assert result.numel() == 0
    result.sum().backward()
    assert not any(t.grad.any() for t in arguments)


def test_shards_of_the_tokens_are_independent(backend, device) -> None:
    history, *rest = inputs(tokens=(37,), dtype=torch.bfloat16, device=device)
    means = token_means(history)
    whole = fused_output_head(history, *rest, means=means, backend=backend)
    for part in (slice(0, 16), slice(16, 37), slice(5, 6)):
        shard, its_means = history[:, :, part].contiguous(), means[:, :, part].contiguous()
        result, expected = fused_output_head(shard, *rest, means=its_means, backend=backend), whole[:, :, part]
        # on a CPU the order of summation of a matrix product may depend on the number of rows
        assert torch.equal(result, expected) if backend == "triton" else torch.allclose(result, expected, rtol=0.01)


def test_cpu_tiles_of_any_size_match_float64(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "FEW", 0)
    for tile in (1, 100, 1000, 5000, cpu.TILE):
        monkeypatch.setattr(cpu, "TILE", tile)
        for modulated in (1, 3):
            arguments = inputs(samples=3, tokens=(7,), channels=24, modulated=modulated, dtype=torch.float64)
            expected = in_float64(*arguments)
            torch.testing.assert_close(fused_output_head(*arguments), expected, rtol=1e-12, atol=1e-12)
            arguments[0] -= arguments[0].mean(-1, keepdim=True)
            torch.testing.assert_close(fused_output_head(*arguments, centred=True), expected, rtol=1e-12, atol=1e-12)


def test_means_are_those_of_the_tokens_in_float32() -> None:
    feature = (100 + torch.randn(2, 3, 500)).bfloat16()
    means = token_means(feature)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.double(), feature.double().mean(-1), rtol=1e-6, atol=0)


def test_addresses_are_64_bit(device) -> None:
    """Features that are 2^31 elements apart, in virtual memory of which only a few pages are used."""
    if device.type == "cuda":
        pytest.skip("a GPU would allocate all of this memory")
    apart, arguments = 1 << 31, inputs(2, 2, 1, (3,), 64, dtype=torch.bfloat16)
    room = torch.empty(apart + 3 * 64, dtype=torch.bfloat16)
    history = room.as_strided((2, 1, 3, 64), (apart, 3 * 64, 64, 1))
    history.copy_(arguments[0])
    assert torch.equal(
        fused_output_head(history, *arguments[1:], backend="triton"), fused_output_head(*arguments, backend="triton")
    )


def record_table(monkeypatch) -> None:
    """Let the launcher make its table by operators that the memory check sees."""
    from lesa_kernels.ops.fused_output_head import launch

    def recorded(*arguments):
        table = linear(*arguments)
        return table.new_empty(table.shape).copy_(table)

    linear = launch.functional.linear
    monkeypatch.setattr(launch.functional, "linear", recorded)


@pytest.mark.parametrize(
    "shape",
    [(3, 2, 2, (20,), 72, 6), (2, 7, 1, (17,), 71, 5), (16, 3, 2, (5,), 64, 200)],
    ids=str,
)
def test_no_access_is_out_of_bounds(shape, device, monkeypatch) -> None:
    if device.type == "cuda":
        pytest.skip("needs the interpreter")
    record_table(monkeypatch)
    from tests.lesa_kernels.memcheck import memcheck

    history, coefficients, _, multiplier, addend, weight, offset = inputs(*shape, dtype=torch.bfloat16)
    means = token_means(history)
    with memcheck(history, coefficients, multiplier, weight, means):
        fused_output_head(
            history, coefficients, None, multiplier, addend, weight, offset, means=means, backend="triton"
        )


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import lesa_kernels.ops.fused_output_head.op"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (3, 72), "history"),
        (1, (2, 4), r"\[P, 3\]"),
        (2, (3,), r"bias \[3\] must be \[2\]"),
        (3, (2, 3, 72), r"multiplier .* \[2, 2 or 1, 72\]"),
        (4, (2, 72), "addend"),
        (5, (6, 71), "72 channels"),
        (6, (5,), "projection_bias"),
    ],
)
def test_wrong_shapes_are_named(position, shape, message) -> None:
    arguments = inputs()
    arguments[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        fused_output_head(*arguments)


def test_wrong_means_devices_and_backends_are_named() -> None:
    arguments = inputs()
    with pytest.raises(ValueError, match=r"means \[3, 2\] must be \[3, 2, 20\]"):
        fused_output_head(*arguments, means=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="weight is on meta"):
        fused_output_head(*arguments[:5], arguments[5].to("meta"), arguments[6])
    with pytest.raises(ValueError, match="backend"):
        fused_output_head(*arguments, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_nan_in_the_multiplier_reaches_the_output(dtype, device) -> None:
    """The NaN with all bits set is the one that GPUs make; rounding it by adding to its bits would overflow."""
    arguments = inputs(dtype=dtype, device=device)
    arguments[3] = arguments[3].float()
    arguments[3].view(torch.int32).fill_(0x7FFFFFFF)
    assert fused_output_head(*arguments, backend="triton").isnan().all()
