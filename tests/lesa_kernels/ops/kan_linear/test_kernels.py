"""The results of the KAN kernels, against float64 and against finite differences."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lesa_kernels import KAN, kan_linear
from lesa_kernels.ops.kan_linear import reference
from lesa_kernels.ops.kan_linear.op import run_layer
from tests.lesa_kernels.splines import knots_of, scipy_bases

pytest.importorskip("triton")
from lesa_kernels.ops.kan_linear import launch
from lesa_kernels.ops.kan_linear.tiles import FEW_ROWS, GENERAL, HOPPER, ONE_ROW

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD = {
    "small": 2**62,
    "medium": 0,
    "large": 0,
    "odd": 0,
    "hopper": 0,
}  # up to this number of outputs the small kernel is used


@pytest.fixture
def tiles(monkeypatch, request):
    """Force the choice of these tiles."""
    monkeypatch.setattr(launch, "SMALL_OUTPUTS", FORWARD[request.param])
    monkeypatch.setattr(launch, "has_wide_rows", lambda *sizes: request.param != "odd")
    monkeypatch.setattr(launch, "NUM_SMS", 0 if request.param in ("large", "hopper") else 2**62)
    monkeypatch.setattr(launch, "tiles_of", lambda x: HOPPER if request.param == "hopper" else GENERAL)
    return request.param


def arguments(shape, in_features, out_features, bases, dtype, device, spread=2.5) -> list[Tensor]:
    x = torch.randn(*shape, in_features, device=device) * spread
    base = torch.randn(out_features, in_features, device=device) / in_features**0.5
    spline = torch.randn(out_features, in_features, bases, device=device) / in_features**0.5
    return [t.to(dtype) for t in (x, base, spline)]


def layer_and_gradients(tensors, dy, **options) -> list[Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = kan_linear(*tensors, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def relative(error: Tensor, exact: Tensor) -> float:
    return (error.double().norm() / exact.norm().clamp(min=1e-30)).item()


def assert_as_accurate_as_reference(tensors, dy, **options) -> None:
    """Errors of output and gradients against float64: at most twice those of the reference plus half a rounding."""
    ours = layer_and_gradients(tensors, dy, backend="triton", **options)
    eager = layer_and_gradients(tensors, dy, backend="torch", **options)
    exact = layer_and_gradients([t.double() for t in tensors], dy.double(), backend="torch", **options)
    for name, a, b, c in zip(("y", "dx", "d base", "d spline"), ours, eager, exact, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, c.shape, torch.empty(c.shape).stride()), name
        assert relative(a - c, c) <= 2 * relative(b - c, c) + torch.finfo(a.dtype).eps / 2, name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", FORWARD, indirect=True)
@pytest.mark.parametrize(
    ("shape", "in_features", "out_features", "grid_size", "order"),
    [((5,), 7, 3, 5, 3), ((2, 39), 9, 5, 8, 2), ((3,), 3, 18, 2, 1)],
    ids=["cubic", "two-chunks-quadratic", "linear"],
)
def test_error_against_float64(tiles, dtype, shape, in_features, out_features, grid_size, order, device):
    tensors = arguments(shape, in_features, out_features, grid_size + order, dtype, device)
    dy = torch.randn(*shape, out_features, device=device).to(dtype)
    assert_as_accurate_as_reference(tensors, dy, order=order)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("tiles", "rows", "in_features", "out_features"),
    [("small", 1, 130, 3), ("small", 5, 70, 6), ("large", 135, 19, 130), ("hopper", 135, 19, 130)],
    indirect=["tiles"],
)
def test_tiles_cover_the_result_without_gaps(tiles, dtype, rows, in_features, out_features, device, monkeypatch):
    """More rows, inputs and outputs than a tile has, for every kernel, and several splits."""
    monkeypatch.setattr(launch, "ROWS_PER_SPLIT", 64)
    tensors = arguments((rows,), in_features, out_features, 8, dtype, device)
    assert_as_accurate_as_reference(tensors, torch.randn(rows, out_features, device=device).to(dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_knots_far_outside_and_for_equal_inputs(dtype, order, device):
    low, high = -2.0, 2.0  # intervals of 1/2, so that knots are exact in all dtypes
    knots = torch.from_numpy(knots_of(8, order, (low, high)))
    largest = 6e4 if dtype == torch.float16 else 1e30
    x = torch.cat([knots, torch.tensor([-largest, -50.0, 50.0, 1000.0]), torch.full((5,), 0.3)])
    _, base, spline = arguments((1,), 1, 2, 8 + order, dtype, device)
    base[0] = 0  # otherwise the base terms of the largest x would hide the splines
    dy = torch.randn(len(x), 2, device=device).to(dtype)
    dy[len(knots) : len(knots) + 4, 1] /= largest
    assert_as_accurate_as_reference(
        [x[:, None].to(device, dtype), base, spline], dy, order=order, grid_range=(low, high)
    )


@pytest.mark.parametrize("tiles", FORWARD, indirect=True)
def test_outside_the_grid_the_spline_is_exactly_zero(tiles, device):
    x, base, spline = arguments((4,), 3, 2, 8, torch.float32, device)
    x = torch.tensor([-7.0, 6.7, 80.0, -1e30], device=device)[:, None].expand(4, 3)
    assert torch.equal(kan_linear(x, base * 0, spline, backend="triton"), torch.zeros(4, 2, device=device))


@pytest.mark.parametrize("tiles", FORWARD, indirect=True)
def test_nan_and_infinity_stay_in_their_row(tiles, device):
    x, base, spline = arguments((4,), 3, 2, 8, torch.float32, device)
    x[1, 0], x[3, 2] = torch.nan, torch.inf
    y = kan_linear(x, base, spline, backend="triton")
    expected = kan_linear(x, base, spline, backend="torch")
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[1].isnan().all()
    assert y[3].isinf().all()
    assert y[::2].isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_in_any_memory_layout(dtype, device):
    big, base, spline = arguments((6,), 16, 5, 8, dtype, device)
    weights = base[:, :4].T.contiguous().T, spline[:, :4].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    dy = torch.randn(5, 6, device=device).to(dtype).T
    surrounded = torch.full_like(big, torch.nan)
    surrounded[:, 3:7] = big[:, 3:7]
    for x in (surrounded[:, 3:7], big[:1, :4].expand(6, 4), big[:, ::4], big.T[:4].T, big[::2, :4].repeat(2, 1)):
        assert_as_accurate_as_reference([x, *weights], dy)
    assert_as_accurate_as_reference([big[0, :4], *weights], torch.ones((), dtype=dtype, device=device).expand(5))


@pytest.mark.parametrize("sizes", list(itertools.product((0, 2), repeat=3))[:-1], ids=str)
def test_empty_inputs_give_empty_outputs(sizes, device):
    rows, in_features, out_features = sizes
    tensors = arguments((rows,), in_features, out_features, 8, torch.float32, device)
    dy = torch.ones(rows, out_features, device=device)
    ours = layer_and_gradients(tensors, dy, backend="triton")
    for a, b in zip(ours, layer_and_gradients(tensors, dy, backend="torch"), strict=True):
        assert torch.equal(a, b)


def test_rows_may_be_further_apart_than_32_bits_address(device):
    x, base, spline = arguments((2,), 3, 2, 8, torch.float16, device)
    apart = torch.empty(2**31 + 16, dtype=x.dtype, device=device).as_strided((2, 3), (2**31, 1))
    apart.copy_(x)  # 4 GB of virtual memory, of which a few pages are used
    assert torch.equal(kan_linear(apart, base, spline, backend="triton"), kan_linear(x, base, spline, backend="triton"))


@pytest.mark.parametrize("splits", [1, 4])
def test_weight_gradients_are_the_same_bits_in_every_run(splits, device, monkeypatch):
    monkeypatch.setattr(launch, "ROWS_PER_SPLIT", 100 if splits == 1 else 16)
    tensors = arguments((70,), 5, 3, 8, torch.float32, device)
    dy = torch.randn(70, 3, device=device)
    first = layer_and_gradients(tensors, dy, backend="triton")
    for a, b in zip(first, layer_and_gradients(tensors, dy, backend="triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 63, 512, 1025, 65536, 300_001])
def test_splits_cover_every_row_once(rows, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append((grid, args))

    monkeypatch.setattr(launch.gradient_kernels, "weight_gradient_kernel", Recorder())
    monkeypatch.setattr(launch.gradient_kernels, "sum_splits_kernel", Recorder())
    launch.weight_gradients(torch.empty(rows, 32), torch.empty(rows, 32), 8, 3, (-3.0, 3.0))
    for (tiles, splits), (*_, rows_per_split) in [(grid, args[:5]) for grid, args in grids if len(grid) == 2]:
        assert (splits - 1) * rows_per_split < rows <= splits * rows_per_split
        assert tiles * splits <= max(tiles, launch.WEIGHT_GRADIENT_PROGRAMS)


def model64(x: np.ndarray, base: np.ndarray, spline: np.ndarray, order: int) -> np.ndarray:
    """The formula of the layer in float64, with scipy's splines."""
    bases = scipy_bases(x, knots_of(spline.shape[-1] - order, order, (-3.0, 3.0)), order)
    return np.einsum("oi,bi->bo", base, x / (1 + np.exp(-x))) + np.einsum("oig,big->bo", spline, bases)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("tiles", ["small", "medium"], indirect=True)
def test_gradients_against_finite_differences(tiles, order, device):
    tensors = arguments((6,), 4, 3, 5 + order, torch.float32, device)
    dy = torch.randn(6, 3, device=device)
    y, *gradients = layer_and_gradients(tensors, dy, order=order, backend="triton")
    at = [t.cpu().double().numpy() for t in tensors]
    np.testing.assert_allclose(y.cpu(), model64(*at, order), rtol=1e-5, atol=1e-5)
    step = 1e-6
    for i, gradient in enumerate(gradients):
        gradient = gradient.cpu().numpy()
        for index in list(np.ndindex(gradient.shape))[:: max(1, gradient.size // 20)]:
            ahead, behind = (list(map(np.copy, at)) for _ in range(2))
            ahead[i][index] += step
            behind[i][index] -= step
            difference = (model64(*ahead, order) - model64(*behind, order)) / (2 * step)
            expected = (difference * dy.cpu().numpy()).sum()
            assert gradient[index] == pytest.approx(expected, rel=2e-5, abs=2e-5)


def reference_function(order, grid_range=(-1.2, 0.9), grid=None):
    return lambda *tensors: reference.kan_linear(*tensors, order=order, grid_range=grid_range, grid=grid)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("order", [3, 4])
def test_gradients_of_the_reference(order, explicit):
    tensors = [t.requires_grad_() for t in arguments((3,), 2, 2, 4 + order, torch.float64, "cpu", spread=0.8)]
    grid = torch.rand(2, 5 + 2 * order, dtype=torch.float64).sort(-1).values * 4 - 2 if explicit else None
    function = reference_function(order, grid=grid)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def second_derivatives(tensors, dy, backend) -> list[Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    x, base, spline = tensors
    # The base weight depends on x: its part of the gradient must not be counted twice
    y = kan_linear(x, base * x.mean(), spline, backend=backend)
    gradients = torch.autograd.grad((y.square() * dy.to(y.dtype)).sum(), tensors, create_graph=True)
    total = sum(g.square().mean() for g in gradients)
    return [total.detach(), *torch.autograd.grad(total, tensors)]


def test_second_derivatives_with_the_triton_backend(device):
    tensors = arguments((5,), 4, 3, 8, torch.float32, device, spread=1.5)
    dy = torch.randn(5, 3, device=device)
    ours = second_derivatives(tensors, dy, "triton")
    exact = second_derivatives([t.double() for t in tensors], dy, "torch")
    for a, b in zip(ours, exact, strict=True):
        assert relative(a - b, b) < 2e-6


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_only_wanted_gradients_are_computed(needed, device, monkeypatch):
    launched = []
    for name in ("input_gradient", "weight_gradients"):
        real = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, real=real, name=name: (launched.append(name), real(*a))[1])
    tensors = arguments((2,), 3, 2, 8, torch.float32, device)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    kan_linear(*tensors, backend="triton").sum().backward()
    assert [t.grad is not None for t in tensors] == list(needed)
    assert launched == ["input_gradient"] * needed[0] + ["weight_gradients"] * (needed[1] or needed[2])


def test_backward_keeps_x_and_the_weights_only(device):
    tensors = [t.requires_grad_() for t in arguments((9,), 4, 3, 8, torch.float32, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        kan_linear(*tensors, backend="triton")
    assert kept == [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("reason", ["order 0", "order 4", "float64", "explicit knots"])
def test_arguments_without_a_kernel_run_on_the_reference(reason, device, monkeypatch):
    monkeypatch.delattr(launch, "forward")
    order = int(reason[-1]) if "order" in reason else 3
    dtype = torch.float64 if reason == "float64" else torch.float32
    tensors = arguments((4,), 3, 2, 5 + order, dtype, device)
    grid = torch.linspace(-7, 7, 12, device=device).repeat(3, 1) if reason == "explicit knots" else None
    ours = kan_linear(*tensors, order=order, grid=grid, backend="triton")
    assert torch.equal(ours, reference.kan_linear(*tensors, order=order, grid_range=(-3.0, 3.0), grid=grid))


def test_a_gate_takes_one_launch_per_layer(device, monkeypatch):
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("forward_small_kernel", "forward_kernel"):
        monkeypatch.setattr(launch.kernels, name, Counted(getattr(launch.kernels, name)))
    gate = KAN([7, 8, 8, 1]).to(device)
    x = torch.randn(2, 7, device=device)
    with torch.no_grad():
        expected = gate(x)
        monkeypatch.setattr(
            "lesa_kernels.ops.kan_linear.modules.run_layer",
            lambda *a, **k: run_layer(*a, **(k | {"backend": "triton"})),
        )
        launches.clear()
        torch.testing.assert_close(gate(x), expected)
    assert len(launches) == 3


@pytest.mark.parametrize(
    ("rows", "outputs", "expected"),
    [
        (1, 256, ONE_ROW),
        (50, 256, FEW_ROWS),
        (256, 256, FEW_ROWS),
        (4096, 256, GENERAL.medium[2]),
        (65536, 256, GENERAL.large[2]),
        (65536, 1, FEW_ROWS),
        (8, 16384, GENERAL.medium[2]),
    ],
)
def test_the_shape_selects_the_kernel(rows, outputs, expected):
    small, config = launch.forward_config(rows, outputs, itemsize=2)
    assert config == expected
    assert small == (expected in (ONE_ROW, FEW_ROWS))


def test_on_hopper_a_program_takes_256_outputs_where_that_fills_the_gpu():
    for rows, outputs, expected in (
        (65536, 256, "wide"),
        (65536, 128, "large"),
        (16384, 256, "large"),
        (4096, 256, "medium"),
    ):
        _, config = launch.forward_config(rows, outputs, itemsize=2, tiles=HOPPER)
        assert config == getattr(HOPPER, expected)[2]


def test_rows_that_16_bytes_do_not_divide_get_smaller_tiles():
    assert launch.has_wide_rows(8, 256, 64)
    assert not launch.has_wide_rows(11, 256, 64)
    assert not launch.has_wide_rows(8, 256, 51)
    assert launch.forward_config(65536, 256, itemsize=2, wide=False) == (False, GENERAL.odd[2])
