"""Each operation on a GPU: nothing waits, graphs and streams, sizes at the limits."""

import pytest
import torch

from lesa_kernels import combine, fused_output_head, gram_row, prediction_error
from tests.native.conftest import OPERATIONS, call_of, no_host_wait


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_call_makes_the_host_wait(operation):
    call = call_of(operation)
    call()
    with no_host_wait():
        call()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_graph_replays_the_same_bits(operation):
    call = call_of(operation)
    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_stream_sees_what_was_queued_before(operation):
    call = call_of(operation)
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_runs_give_the_same_bits(operation):
    call = call_of(operation)
    first = call()
    assert all(torch.equal(call(), first) for _ in range(5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_on_a_gpu_that_is_not_current(operation):
    torch.testing.assert_close(call_of(operation, "cuda:1")().cpu(), call_of(operation, "cuda:0")().cpu())


@pytest.mark.parametrize("shape", [(2, 8), (2, 1), (2, 4), (2, 1, 8), (2, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_one_vector(shape, dtype):
    history = torch.randn(shape, device="cuda").to(dtype)
    coefficients = torch.randn(1, 2, device="cuda")
    torch.testing.assert_close(combine(history, coefficients), combine(history, coefficients, backend="torch"))
    row, expected = gram_row(history, history[0]), gram_row(history, history[0], backend="torch")
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)  # products are added in float32
    ours = prediction_error(history, coefficients[0], history[0])
    expected = prediction_error(history, coefficients[0], history[0], backend="torch")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    if history.ndim == 3:
        own = torch.randn(1, 2, 1, shape[-1], device="cuda")
        torch.testing.assert_close(combine(history, own), combine(history, own, backend="torch"))


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_head_of_one_token(channels, outputs):
    history, coefficients = torch.randn(2, 1, 1, channels, device="cuda"), torch.randn(1, 2, device="cuda")
    rows, weight = torch.randn(1, 1, channels, device="cuda"), torch.randn(outputs, channels, device="cuda")
    arguments = history, coefficients, None, rows, rows, weight
    expected = fused_output_head(*arguments, backend="torch")
    torch.testing.assert_close(fused_output_head(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_in_the_multiplier_is_a_nan_in_the_output(dtype):
    history = torch.randn(2, 1, 20, 64, device="cuda").to(dtype)
    multiplier, addend = torch.ones(1, 1, 64, device="cuda"), torch.zeros(1, 1, 64, device="cuda")
    multiplier[..., 5] = float("nan")
    weight = torch.randn(16, 64, device="cuda").to(dtype)
    out = fused_output_head(history, torch.ones(1, 2, device="cuda"), None, multiplier, addend, weight)
    assert bool(out.isnan().all())


def test_float32_heads_are_exact_where_tf32_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    history, coefficients = torch.randn(3, 1, 64, 256, device="cuda"), torch.randn(2, 3, device="cuda")
    multiplier, weight = torch.randn(2, 1, 256, device="cuda"), torch.randn(16, 256, device="cuda") / 16
    arguments = history, coefficients, None, multiplier, torch.zeros_like(multiplier), weight
    exact = fused_output_head(*(None if a is None else a.double() for a in arguments), backend="torch")
    error = (fused_output_head(*arguments).double() - exact).norm() / exact.norm()
    assert error < 2e-6


def test_offsets_beyond_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB")
    history = torch.randn(3, 2**30, device="cuda", dtype=torch.bfloat16)
    coefficients = torch.randn(2, 3, device="cuda")
    out = combine(history, coefficients)
    for part in (slice(0, 4096), slice(-4096, None)):
        assert torch.equal(out[:, part], combine(history[:, part].contiguous(), coefficients))
    row = gram_row(history, history[2])
    assert torch.allclose(
        row, torch.stack([(h.float() * history[2].float()).sum(dtype=torch.float64) for h in history]), rtol=1e-3
    )
