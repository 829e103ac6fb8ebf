"""The results of ``kan_predict``: against float64 with scipy's splines, and against the same sums in the same dtype."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch import Tensor

from lesa_kernels import kan_predict
from lesa_kernels.ops.kan_predict import op, pieces, reference
from tests.lesa_kernels.splines import knots_of, scipy_bases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = (-3.0, 3.0)


def inputs(
    window: int, steps: int, experts: int, feature, *, grid_size=5, order=3, dtype=torch.float32, device="cpu"
) -> tuple[Tensor, ...]:
    """The six tensors. Some features are far outside of the grid; predictions are about as large as the features."""
    small = 1 / (2 * window)
    return (
        3 * torch.randn(window, *feature, device=device).to(dtype),
        torch.rand(steps, experts, device=device),
        small * torch.randn(experts, window, device=device),
        small * torch.randn(experts, window, device=device),
        small * torch.randn(experts, window, grid_size + order, device=device),
        torch.randn(experts, device=device),
    )


def oracle(
    history, gates, linear_weight, base_weight, spline_weight, bias, scale=None, *, order=3, grid_range=GRID
) -> Tensor:
    """The equations of the reference in float64, expert by expert, with scipy's splines."""
    h, gates, linear, base, spline, shift = (
        t.double().cpu().numpy() for t in (history, gates, linear_weight, base_weight, spline_weight, bias)
    )
    s = np.ones(()) if scale is None else scale.double().cpu().numpy()
    knots = knots_of(spline.shape[-1] - order, order, grid_range)
    sequence = list(h)
    for gate in gates:
        change = np.zeros_like(h[0])
        for e, g in enumerate(gate):
            z = np.full_like(h[0], shift[e])
            for k, feature in enumerate(sequence[-len(h) :]):
                x = s * feature
                silu = x * expit(x)
                z += linear[e, k] * feature
                z += (base[e, k] * silu + scipy_bases(x, knots, order) @ spline[e, k]) / s
            change += g * z
        sequence.append(sequence[-1] + change)
    return torch.from_numpy(np.stack(sequence[len(h) :]))


def assert_accurate(result: Tensor, tensors, scale=None, *, order=3, grid_range=GRID) -> None:
    """The error is at most twice that of the reference in the same dtype, plus a few float32 roundings."""
    exact = oracle(*tensors, scale, order=order, grid_range=grid_range)
    eager = reference.kan_predict(*tensors, scale, order=order, grid_range=grid_range).double().cpu()
    assert result.shape == exact.shape
    assert result.dtype == tensors[0].dtype
    floor = 8 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())
    assert (result.double().cpu() - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "steps"), [(8, 6), (4, 1), (3, 7)])
def test_kernel_matches_float64(window, steps, dtype, scaled, device) -> None:
    tensors = inputs(window, steps, 3, (5, 48), dtype=dtype, device=device)
    scale = 0.5 + torch.rand(48, device=device) if scaled else None
    assert_accurate(kan_predict(*tensors, scale=scale, backend="triton"), tensors, scale)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize(
    ("order", "grid_size", "grid_range"), [(1, 5, GRID), (2, 7, (-1.0, 4.0)), (3, 1, (0.5, 0.75)), (3, 40, GRID)]
)
def test_any_uniform_grid_matches_float64(order, grid_size, grid_range, backend, device) -> None:
    tensors = inputs(2, 3, 2, (3, 40), grid_size=grid_size, order=order, device=device)
    scale = 0.5 + torch.rand(40, device=device)
    kwargs = {"order": order, "grid_range": grid_range}
    assert_accurate(kan_predict(*tensors, scale=scale, backend=backend, **kwargs), tensors, scale, **kwargs)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("feature", [(1,), (7, 13), (3, 8), (2, 3, 343)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_feature_size_matches_float64(feature, dtype, device) -> None:
    tensors = inputs(2, 2, 2, feature, dtype=dtype, device=device)
    scale = 0.5 + torch.rand(feature[-1], device=device)
    for s in (scale, None):
        assert_accurate(kan_predict(*tensors, scale=s, backend="triton"), tensors, s)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_features_on_knots_and_far_outside_the_grid(order, backend, device) -> None:
    """On and beside every knot, beyond the extended grid, and where the number of the interval overflows an integer."""
    knots = torch.from_numpy(knots_of(6, order, GRID)).float()  # integers, exact in float32
    far = torch.tensor([30.0, 1e4, 1e12, 1e30])
    values = torch.cat([knots, knots.nextafter(far[3]), knots.nextafter(-far[3]), far[:2], -far[:2]])
    _, *weights = inputs(3, 1, 2, (1,), grid_size=6, order=order, device=device)
    tensors = values.repeat(3, 1).to(device), *weights
    result = kan_predict(*tensors, order=order, backend=backend)
    exact = oracle(*tensors, order=order)
    torch.testing.assert_close(result.double().cpu(), exact, rtol=2e-6, atol=2e-6)

    linear_weight, base_weight = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
    history = torch.cat([far, -far]).repeat(3, 1).to(device)
    only_splines = weights[0], linear_weight, base_weight, weights[3], torch.zeros(2, device=device)
    assert torch.equal(kan_predict(history, *only_splines, order=order, backend=backend), history[:1])


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_nan_stays_where_it_is(backend, device) -> None:
    tensors = inputs(3, 2, 2, (4, 8), device=device)
    clean = kan_predict(*tensors, backend=backend)
    tensors[0][1, 2, 5] = float("nan")
    result = kan_predict(*tensors, backend=backend)
    where = torch.zeros_like(result, dtype=torch.bool)
    where[:, 2, 5] = True
    assert torch.equal(result.isnan(), where)
    assert torch.equal(result[~where], clean[~where])


sizes = given(
    window=st.integers(1, 8),
    steps=st.integers(1, 6),
    experts=st.integers(1, 3),
    feature=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    scaled=st.booleans(),
)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@settings(max_examples=12, deadline=None)
@sizes
def test_without_splines_it_is_the_step_of_the_paper(backend, window, steps, experts, feature, scaled, device) -> None:
    history, gates, linear_weight, base_weight, spline_weight, bias = inputs(
        window, steps, experts, feature, device=device
    )
    zeros = torch.zeros_like(base_weight), torch.zeros_like(spline_weight)
    scale = 0.5 + torch.rand(feature[-1], device=device) if scaled else None
    result = kan_predict(history, gates, linear_weight, *zeros, bias, scale=scale, backend=backend)
    sequence = list(history.double())
    for gate in gates.double():
        latent = torch.einsum("ek,k...->e...", linear_weight.double(), torch.stack(sequence[-window:]))
        latent += bias.double().view(-1, 1, 1)
        sequence.append(sequence[-1] + torch.einsum("e,e...->...", gate, latent))
    torch.testing.assert_close(result.double(), torch.stack(sequence[window:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@settings(max_examples=12, deadline=None)
@sizes
def test_several_steps_equal_single_steps_with_a_moving_window(
    backend, window, steps, experts, feature, scaled, device
) -> None:
    history, gates, *weights = inputs(window, steps, experts, feature, device=device)
    scale = 0.5 + torch.rand(feature[-1], device=device) if scaled else None
    result = kan_predict(history, gates, *weights, scale=scale, backend=backend)
    for p in range(steps):
        single = kan_predict(history, gates[p : p + 1], *weights, scale=scale, backend=backend)
        torch.testing.assert_close(result[p : p + 1], single, rtol=2e-5, atol=2e-5)
        history = torch.cat([history[1:], single])


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("view", ["transposed", "expanded window", "expanded channels", "slots", "misaligned"])
def test_arguments_may_be_any_views(view, backend, device) -> None:
    history, gates, *weights = inputs(3, 2, 2, (6, 16), device=device)
    history = {
        "transposed": history.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded window": history[:1].expand(3, -1, -1),
        "expanded channels": history[..., :1].expand(-1, -1, 16),
        "slots": torch.randn(6, 8, 16, device=device)[::2, :6],
        "misaligned": torch.randn(3 * 96 + 1, device=device)[1:].view(3, 6, 16),
    }[view]
    scale = torch.linspace(0.5, 2, 32, device=device)[::2]
    transposed = [w.transpose(0, -1).contiguous().transpose(0, -1) for w in (gates, *weights)]
    result = kan_predict(history, *transposed, scale=scale, backend=backend)
    assert_accurate(result, (history, gates, *weights), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_weights_may_have_another_dtype(dtype, backend, device) -> None:
    history, *weights = inputs(3, 2, 2, (3, 8), device=device)
    scale = 0.5 + torch.rand(8, device=device)
    weights = [w.to(dtype) for w in weights]
    result = kan_predict(history, *weights, scale=scale.to(dtype), backend=backend)
    exact = oracle(history, *weights, scale.to(dtype))
    torch.testing.assert_close(result.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
@pytest.mark.parametrize(("steps", "feature"), [(2, (0, 8)), (2, (3, 0)), (0, (3, 8))])
def test_no_tokens_and_no_steps_give_empty_results(steps, feature, backend, device) -> None:
    tensors = inputs(3, steps, 2, feature, device=device)
    assert kan_predict(*tensors, backend=backend).shape == (steps, *feature)


@pytest.mark.parametrize(
    ("window", "steps", "order", "dtype"),
    [(3, 2, 0, torch.float32), (3, 2, 4, torch.float32), (3, 2, 3, torch.float64), (17, 17, 3, torch.float32)],
)
def test_arguments_without_a_kernel_run_in_plain_pytorch(window, steps, order, dtype, device) -> None:
    tensors = inputs(window, steps, 2, (3, 8), order=order, dtype=dtype, device=device)
    result = kan_predict(*tensors, order=order, backend="triton")
    assert torch.equal(result, reference.kan_predict(*tensors, None, order=order, grid_range=GRID))


def test_results_in_pieces_equal_the_whole(monkeypatch) -> None:
    tensors = inputs(3, 2, 2, (3, 5, 8))
    scale = 0.5 + torch.rand(8)
    whole = reference.kan_predict(*tensors, scale, order=3, grid_range=GRID)
    monkeypatch.setattr(pieces, "PIECE", 16)
    torch.testing.assert_close(kan_predict(*tensors, scale=scale), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the interpreter's accesses")
@pytest.mark.parametrize("feature", [(7, 13), (9, 24)], ids=str)
def test_kernels_stay_inside_their_tensors(feature, device) -> None:
    from tests.lesa_kernels.memcheck import memcheck

    tensors = inputs(3, 2, 2, feature, device=device)
    scale = 0.5 + torch.rand(feature[-1], device=device)
    tensors[0][0, 0, :4] = torch.tensor([-1e30, 1e30, float("nan"), float("inf")])
    with memcheck(*tensors, scale):
        kan_predict(*tensors, scale=scale, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter checks for overflow, a GPU does not")
def test_offsets_beyond_32_bits_do_not_overflow(device) -> None:
    """Two tensors of 5 GiB virtual memory, of which a few pages are used: row 4 of five starts at element 2^31."""
    from lesa_kernels.ops.kan_predict import kernels

    length, vec, used = 1 << 29, 8, 16
    history, out = (torch.empty(5, length, dtype=torch.float16) for _ in range(2))
    history[:, :used] = torch.arange(5.0).unsqueeze(1)
    table = torch.zeros(5, 6, 16)
    table[:, 5, 0] = 1  # every step adds its bias
    kernels.predict_kernel[(1,)](
        *(history, table, None, out, length // vec, length // vec, length // vec, 5 / 6, 5.5),
        **{"K": 5, "P": 5, "C": 8, "ORDER": 3, "WIDTH": 16, "VEC": vec, "LANES": used // vec},
    )
    assert out[:, used - 1].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("history", (3,), "at least one dimension of channels"),
        ("history", (0, 4, 8), "K >= 1"),
        ("history", (5, 4, 8), r"linear_weight is \[2, 3\], expected \[2, 5\]"),
        ("gates", (2,), r"gates is \[2\], expected \[P, 2\]"),
        ("gates", (2, 3), r"gates is \[2, 3\], expected \[P, 2\]"),
        ("linear_weight", (3, 2), r"linear_weight is \[3, 2\], expected \[2, 3\]"),
        ("base_weight", (2, 4), "base_weight"),
        ("spline_weight", (2, 3), r"expected \[2, 3, grid_size \+ order\]"),
        ("spline_weight", (3, 3, 8), "spline_weight"),
        ("spline_weight", (2, 3, 3), "grid_size >= 1"),
        ("bias", (2, 1), r"bias is \[2, 1\], expected \[2\]"),
        ("scale", (4,), r"scale is \[4\], expected \[8\]"),
        ("scale", (1, 8), "scale"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(name, shape, message) -> None:
    names = ("history", "gates", "linear_weight", "base_weight", "spline_weight", "bias")
    arguments = dict(zip(names, inputs(3, 2, 2, (4, 8)), strict=True)) | {"scale": torch.ones(8)}
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        kan_predict(**arguments)


def test_other_wrong_arguments_are_errors() -> None:
    tensors = inputs(3, 2, 2, (4, 8))
    with pytest.raises(ValueError, match="must be float"):
        kan_predict(tensors[0].long(), *tensors[1:])
    with pytest.raises(ValueError, match="gates is on meta, history on cpu"):
        kan_predict(tensors[0], tensors[1].to("meta"), *tensors[2:])
    with pytest.raises(ValueError, match="grid_range must run"):
        kan_predict(*tensors, grid_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="backend must be one of"):
        kan_predict(*tensors, backend="cuda")


def test_the_kernel_supports_the_tested_dtypes_and_orders() -> None:
    """Otherwise the tests above would compare the reference with itself."""
    history = torch.empty(8, 4, 8)
    assert all(op.kernel_serves(history.to(dtype), 12, order) for dtype in DTYPES for order in (1, 2, 3))
