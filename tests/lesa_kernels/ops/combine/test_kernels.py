"""The results of ``combine`` and ``gram_row``: against float64, and against the same sum in the same dtype."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lesa_kernels import combine, gram_row
from lesa_kernels.ops.combine import cpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["triton", "torch" if torch.cuda.is_available() else "native"]
SIZE = 4096  # elements of a feature in one dimension
FEATURE = (2, 3, 24)
# shapes of coefficients [P, m, *channels] for that feature; the last has no kernel and runs on the reference
CHANNELS = {"shared": (), "shared-ones": (1, 1, 1), "channel": (1, 1, 24), "sample": (2, 1, 1), "token": (1, 3, 1)}


def inputs(m: int, count: int, feature, channels=(), dtype=torch.float32, device="cpu", scale: float = 1.0):
    history = torch.randn(m, *feature, device=device).to(dtype)
    coefficients = scale * torch.randn(count, m, *channels, device=device)
    return history, coefficients, torch.randn(count, *channels, device=device)


def assert_accurate(result: Tensor, history: Tensor, coefficients: Tensor, bias: Tensor | None) -> None:
    """The error is at most twice that of the reference in the same dtype, plus a few float32 roundings of the terms."""
    exact = reference.combine(history.double(), coefficients.double(), None if bias is None else bias.double())
    size = reference.combine(history.double().abs(), coefficients.double().abs(), None)
    eager = reference.combine(history, coefficients, bias)
    assert result.shape == exact.shape
    assert result.dtype == history.dtype
    if exact.numel():
        floor = 4 * torch.finfo(torch.float32).eps * (size.max() + 1)
        assert (result.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + floor


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", CHANNELS)
def test_the_kernel_matches_float64_in_every_layout(layout, dtype, device) -> None:
    history, coefficients, bias = inputs(5, 3, FEATURE, CHANNELS[layout], dtype, device)
    for b in (bias, None):
        assert_accurate(combine(history, coefficients, b, backend="triton"), history, coefficients, b)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("m", "count"), [(1, 1), (2, 12), (16, 3), (13, 13), (20, 2), (40, 1)])
def test_kernel_serves_any_number_of_features_and_predictions(m, count, device) -> None:
    history, coefficients, bias = inputs(m, count, (40,), dtype=torch.bfloat16, device=device)
    assert_accurate(combine(history, coefficients, bias, backend="triton"), history, coefficients, bias)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [(), (1, 13), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_handles_sizes_that_are_no_multiple_of_a_vector(channels, dtype, device) -> None:
    history, coefficients, bias = inputs(3, 2, (3, 13), channels, dtype, device)
    assert_accurate(combine(history, coefficients, bias, backend="triton"), history, coefficients, bias)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", [1024, 1032, 3 * 1024 + 8])
def test_kernel_handles_several_blocks_and_a_partial_one(size, device) -> None:
    history, coefficients, bias = inputs(3, 2, (size,), dtype=torch.bfloat16, device=device)
    assert_accurate(combine(history, coefficients, bias, backend="triton"), history, coefficients, bias)


VIEWS = {
    "every-other-row": lambda t: t[::2],
    "one-row-repeated": lambda t: t[:1].expand(4, -1, -1),
    "misaligned": lambda t: t.view(-1)[3 : 3 + 4 * 64].view(4, 4, 16),
    "transposed": lambda t: t.transpose(1, 2),
    "expanded-feature": lambda t: t[:, :, :1].expand(-1, -1, 16),
    "columns": lambda t: t[:, :, 1:9],
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_history_may_be_any_view(view, backend, device) -> None:
    history = VIEWS[view](torch.randn(8, 4, 16, device=device).bfloat16())
    coefficients = torch.randn(3, 2, len(history), device=device)[:, 1]
    assert_accurate(combine(history, coefficients, backend=backend), history, coefficients, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("m", "count", "feature", "channels"),
    [(3, 2, (0,), ()), (3, 2, (2, 0, 4), (1, 1, 4)), (3, 2, (2, 0), (1, 0)), (3, 0, (4,), ()), (3, 0, (2, 4), (2, 1))],
    ids=str,
)
def test_empty_features_and_no_predictions_give_empty_results(m, count, feature, channels, backend, device) -> None:
    history, coefficients, bias = (t.requires_grad_() for t in inputs(m, count, feature, channels, device=device))
    result = combine(history, coefficients, bias, backend=backend)
    assert result.shape == (count, *feature)
    for gradient in torch.autograd.grad(result.sum(), (history, coefficients, bias)):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
def test_float64_stays_float64(channels, backend, device) -> None:
    history, coefficients, bias = (t.double() for t in inputs(4, 2, FEATURE, channels, device=device))
    expected = torch.einsum(
        "pmbtd,mbtd->pbtd", coefficients.reshape(2, 4, *(channels or (1, 1, 1))).expand(2, 4, *FEATURE), history
    )
    expected = expected + bias.reshape(2, *(channels or (1, 1, 1)))
    result = combine(history, coefficients, bias, backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_coefficients_that_cancel_lose_no_accuracy(dtype, backend, device) -> None:
    size = SIZE * 2
    history = (torch.randn(size, device=device) + 0.05 * torch.randn(8, size, device=device)).to(dtype)
    coefficients = 20 * torch.randn(2, 8, device=device)
    coefficients -= coefficients.mean(1, keepdim=True) - 1 / 8
    assert_accurate(combine(history, coefficients, backend=backend), history, coefficients, None)


@given(
    m=st.integers(1, 16),
    count=st.integers(1, 12),
    size=st.sampled_from([1, 3, 64, 1000, SIZE, 3 * SIZE, cpu.TILES * cpu.COLUMNS, 70_000]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 1000),
    offset=st.sampled_from([None, 0.0, 0.1, 100.0]),
)
@settings(max_examples=60, deadline=None)
def test_cpu_path_is_as_accurate_as_the_reference_for_any_sizes(m, count, size, dtype, seed, offset) -> None:
    torch.manual_seed(seed)
    history, coefficients, bias = inputs(m, count, (size,), dtype=dtype, scale=5)
    bias = None if offset is None else offset * bias
    result = combine(history, coefficients, bias, backend="native")
    exact = reference.combine(history.double(), coefficients.double(), None if bias is None else bias.double())
    error, eager = ((r.double() - exact).norm() for r in (result, reference.combine(history, coefficients, bias)))
    assert error <= 2 * eager + 1e-6 * exact.norm() + 1e-6


@given(
    m=st.integers(1, 9),
    count=st.integers(1, 7),
    feature=st.sampled_from([(5,), (1, 1), (3, 7), (2, 3, 24), (1, 300, 96), (2, 500, 64), (1, 3, 70_000)]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 1000),
    biased=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_cpu_path_per_channel_is_as_accurate_as_the_reference_for_any_sizes(
    m, count, feature, dtype, seed, biased
) -> None:
    torch.manual_seed(seed)
    channels = (*(1,) * (len(feature) - 1), feature[-1])
    history, coefficients, bias = inputs(m, count, feature, channels, dtype, scale=5)
    bias = bias if biased else None
    result = combine(history, coefficients, bias, backend="native")
    assert_accurate(result, history, coefficients, bias)
    strided = torch.randn(m, 2, *feature).to(dtype)
    strided[:, 1] = history
    assert torch.equal(combine(strided[:, 1], coefficients, bias, backend="native"), result)


def test_a_bias_that_cancels_the_sum_is_added_before_rounding() -> None:
    history = (1 + 0.01 * torch.randn(4, SIZE)).bfloat16()
    coefficients, bias = torch.full((1, 4), 5.0), torch.tensor([-20.0])
    assert_accurate(combine(history, coefficients, bias), history, coefficients, bias)


def test_cpu_path_is_as_accurate_as_the_graph_of_the_released_predictor() -> None:
    """Both round the change before they add it to the last feature, so which error is smaller is random."""
    ratios = []
    for gate in torch.linspace(0.05, 2, 64).bfloat16():
        history = torch.randn(8, 4 * SIZE).bfloat16()
        latent = torch.nn.Linear(8, 1).bfloat16().requires_grad_(False)
        released = history[-1] + gate * latent(torch.stack(list(history), -1)).squeeze(-1)
        coefficients = gate.float() * latent.weight.float() + torch.eye(8)[-1:]
        bias = gate.float() * latent.bias.float()
        exact = reference.combine(history.double(), coefficients.double(), bias.double())
        ours = combine(history, coefficients, bias, backend="native")
        ratios.append((ours.double() - exact).norm() / (released.double() - exact).norm())
    assert torch.stack(ratios).quantile(0.9) <= 1
    assert max(ratios) <= 1.15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_element_gives_an_infinite_element(dtype, backend, device) -> None:
    history, coefficients, bias = inputs(3, 2, (SIZE,), dtype=dtype, device=device)
    history[1, 7] = float("inf")
    finite = combine(history, coefficients, bias, backend=backend).isfinite()
    assert not finite[:, 7].any()
    assert finite.sum() == finite.numel() - 2


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["shared", "channel", "token"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_out_is_overwritten_and_returned(contiguous, layout, backend, device) -> None:
    history, coefficients, bias = inputs(3, 2, FEATURE, CHANNELS[layout], torch.bfloat16, device)
    out = torch.full((2, *FEATURE), float("nan"), dtype=torch.bfloat16, device=device)
    if not contiguous:
        out = out.transpose(1, 3).contiguous().transpose(1, 3)
    assert combine(history, coefficients, bias, out=out, backend=backend) is out
    assert torch.equal(out, combine(history, coefficients, bias, backend=backend))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("predictions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_cover_a_prediction_without_gaps(dtype, predictions, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "COLUMNS", 128)
    history, coefficients, bias = inputs(3, predictions, (5 * SIZE + 100,), dtype=dtype)
    assert_accurate(combine(history, coefficients, bias), history, coefficients, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(), (1, SIZE)], ids=["shared", "channel"])
def test_cpu_path_with_out_keeps_no_feature_sized_temporary(channels, dtype) -> None:
    """The size of the largest temporary does not depend on the size of the feature."""
    largest = []
    for size in (2 * cpu.UNCONVERTED_TILES * cpu.COLUMNS, 4 * cpu.UNCONVERTED_TILES * cpu.COLUMNS):
        feature = (size // SIZE, SIZE) if channels else (size,)
        history, coefficients, bias = inputs(1, 1, feature, channels, dtype)
        out = torch.empty(1, *feature, dtype=dtype)
        with torch.profiler.profile(profile_memory=True) as profile:
            combine(history, coefficients, 0.01 * bias, out=out)
        largest.append(max((e.cpu_memory_usage for e in profile.events()), default=0))
    assert largest[0] == largest[1] or max(largest) < 1 << 12


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5000, 40_000])
def test_gram_row_matches_float64(size, dtype, backend, device) -> None:
    history = torch.randn(5, size, device=device).to(dtype)
    row = gram_row(history, history[3], backend=backend)
    expected = history.double() @ history[3].double()
    size = history.double().norm(dim=1) * history[3].double().norm()
    assert row.dtype == torch.float64
    assert ((row - expected).abs() <= 2e-7 * size).all()
    assert torch.equal(row, gram_row(history, history[3], backend=backend))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize(
    ("layout", "feature"), [("shared", (2, 3, 24)), ("channel", (2, 3, 24)), ("sample", (2, 3, 7))]
)
def test_kernels_stay_inside_their_tensors(layout, feature, device) -> None:
    from tests.lesa_kernels.memcheck import memcheck

    channels = tuple(f if c == 24 else c for c, f in zip(CHANNELS[layout], feature, strict=False) if CHANNELS[layout])
    history, coefficients, bias = inputs(5, 3, feature, channels, device=device)
    grad = torch.randn(3, *feature)
    with memcheck(history, coefficients, bias, grad):
        torch.ops.lesa_kernels.combine(history, coefficients, bias, True)
        torch.ops.lesa_kernels.combine_gradients(grad, history, channels, True)
        torch.ops.lesa_kernels.gram_row(history, history[2], True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter checks for overflow, a GPU does not")
def test_offsets_beyond_32_bits_do_not_overflow(device) -> None:
    """6 GiB of virtual memory, of which a few pages are used; the interpreter raises where 32 bits overflow."""
    from lesa_kernels.ops.combine import kernels

    segments, length, block = 5, 1 << 29, 16  # the last segment starts at element 2^31
    history = torch.empty(2, segments * length, dtype=torch.int8)
    out = torch.empty_like(history)
    for segment in range(segments):
        history[:, segment * length : segment * length + block] = torch.tensor([[segment], [7]])
    coefficients = torch.ones(2, 2, segments)
    sizes = (segments * length // 16, length // 16, segments)
    kernels.combine_kernel[(segments,)](
        history, coefficients, None, out, *sizes, P=2, M=2, PER_CHANNEL=False, VEC=16, BLOCK=block
    )
    assert [out[1, s * length + 3].item() for s in range(segments)] == [7, 8, 9, 10, 11]
    dots, sums = torch.empty(1, 2, 2, segments), torch.empty(1, 2, segments)
    shape = {"P": 2, "M": 2, "GROUP": 2, "PER_CHANNEL": False, "VEC": 16, "LANES": 1}
    kernels.dots_kernel[(segments, 1)](history, history, dots, sums, *sizes, 1, **shape)
    assert torch.equal(dots[0, 1, 0], 16 * 7 * torch.arange(5.0))


def test_backend_triton_without_interpreter_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    history, coefficients, _ = inputs(2, 1, (4,))
    with pytest.raises(RuntimeError, match="needs tensors on a GPU"):
        combine(history, coefficients, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        combine(history, coefficients, backend="cuda")


def test_without_triton_the_package_works_and_says_what_is_missing() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, lesa_kernels
history, coefficients = torch.ones(2, 8), torch.ones(1, 2, requires_grad=True)
lesa_kernels.combine(history, coefficients).sum().backward()
try:
    lesa_kernels.combine(history, coefficients, backend="triton")
except RuntimeError as error:
    print(error)
"""
    # with None in sys.modules find_spec raises, while for a missing package it returns None
    program = program.replace(
        "import torch, lesa",
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\nimport torch, lesa",
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install" in done.stdout, done.stderr[-1000:]


@pytest.mark.parametrize(
    ("history", "coefficients", "bias", "out", "message"),
    [
        ((2, 4), (1, 3), None, None, r"must be \[P, 2, \.\.\.\]"),
        ((2, 4), (2,), None, None, r"must be \[P, 2, \.\.\.\]"),
        ((0, 4), (1, 0), None, None, r"must be \[P, 0, \.\.\.\]"),
        ((2, 3, 4), (1, 2, 4), None, None, "does not broadcast"),
        ((2, 3, 4), (1, 2, 3, 5), None, None, "does not broadcast"),
        ((2, 3, 4), (5, 2), (4,), None, "bias"),
        ((2, 3, 4), (5, 2, 1, 4), (5,), None, "bias"),
        ((2, 3, 4), (5, 2), None, (5, 4, 3), "out is"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(history, coefficients, bias, out, message) -> None:
    tensors = [None if shape is None else torch.zeros(shape) for shape in (history, coefficients, bias, out)]
    with pytest.raises(ValueError, match=message):
        combine(*tensors[:3], out=tensors[3])


def test_devices_and_features_that_do_not_fit_are_errors() -> None:
    history = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="coefficients is on meta"):
        combine(history, torch.zeros(1, 2, device="meta"))
    with pytest.raises(ValueError, match="feature is"):
        gram_row(history, torch.zeros(5))
    with pytest.raises(ValueError, match="no gradients"):
        combine(history, torch.zeros(1, 2, requires_grad=True), out=torch.zeros(1, 4))
