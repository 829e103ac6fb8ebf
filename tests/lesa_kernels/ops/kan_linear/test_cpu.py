"""The KAN layer in tiles on a CPU, against float64, the reference and scipy."""

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from lesa_kernels import kan_linear
from lesa_kernels.ops.kan_linear import cpu, reference
from tests.lesa_kernels.ops.kan_linear.test_kernels import arguments, layer_and_gradients, relative, second_derivatives
from tests.lesa_kernels.splines import knots_of, scipy_bases

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "TILE", 300)
    monkeypatch.setattr(cpu, "ROWS", 3)


def some_knots(in_features: int, bases: int, order: int) -> torch.Tensor:
    """Different knots for each input; those of the first input repeat at both ends."""
    knots = torch.rand(in_features, bases + order + 1, dtype=torch.float64).sort(-1).values * 10 - 5
    knots[0, : order + 1], knots[0, -order - 1 :] = knots[0, 0], knots[0, -1].clone()
    return knots


def space(grid: cpu.Grid, x: torch.Tensor) -> torch.Tensor:
    return torch.full((2, x.numel() * (grid.bases + 1)), torch.nan, dtype=x.dtype)


def slopes(grid: cpu.Grid, x: torch.Tensor) -> torch.Tensor:
    """x [in, rows] -> [in, C, rows]."""
    units = torch.eye(grid.bases, dtype=x.dtype)
    factors = (u[:, None].expand(len(x), -1, x.shape[1]) for u in units)
    return torch.stack([grid.contract_slopes(x, f, space(grid, x)) for f in factors], 1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid_size", [1, 5, 40])
def test_bases_and_slopes_equal_those_of_scipy(order, grid_size):
    knots = knots_of(grid_size, order, (-3.0, 2.0))
    x = np.linspace(
        knots[0] - 1.0123, knots[-1] + 1.0234, 331
    )  # none on a knot, where slopes of order 1 are not continuous
    columns = torch.from_numpy(x)[None]
    for explicit in (None, torch.from_numpy(knots)[None]):
        grid = cpu.Grid(grid_size + order, order, (-3.0, 2.0), explicit)
        for ours, derivative in ((grid.expand(columns, space(grid, columns)), 0), (slopes(grid, columns), 1)):
            expected = scipy_bases(x, knots, order, derivative)
            np.testing.assert_allclose(ours[0].T.numpy(), expected, rtol=0, atol=1e-11 * grid_size)


def test_slopes_on_repeated_knots_equal_those_of_scipy():
    knots = some_knots(1, 7, 3)
    x = torch.linspace(-6, 6, 173, dtype=torch.float64)
    spline = BSpline(knots[0].numpy(), np.eye(7), 3, extrapolate=False)
    ours = slopes(cpu.Grid(7, 3, (-1.0, 1.0), knots), x[None])
    np.testing.assert_allclose(ours[0].T.numpy(), np.nan_to_num(spline(x.numpy(), nu=1)), atol=1e-8)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("shape", "grid_size", "order"), [((29,), 5, 3), ((2, 3, 7), 8, 2), ((), 2, 1), ((29,), 17, 3), ((29,), 18, 1)]
)
def test_output_and_gradients_are_as_accurate_as_the_reference(dtype, explicit, shape, grid_size, order):
    tensors = arguments(shape, 6, 5, grid_size + order, dtype, "cpu")
    dy = torch.randn(*shape, 5).to(dtype)
    options = {"order": order, "grid": some_knots(6, grid_size + order, order).float() if explicit else None}
    ours = layer_and_gradients(tensors, dy, **options)
    eager = layer_and_gradients(tensors, dy, backend="torch", **options)
    exact = layer_and_gradients([t.double() for t in tensors], dy.double(), backend="torch", **options)
    for name, a, b, c in zip(("y", "dx", "d base", "d spline"), ours, eager, exact, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, c.shape, torch.empty(c.shape).stride()), name
        assert relative(a - c, c) <= 2 * relative(b - c, c) + torch.finfo(dtype).eps / 2, name


@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_equal_finite_differences(explicit):
    tensors = [t.requires_grad_() for t in arguments((4,), 3, 2, 8, torch.float64, "cpu")]
    grid = some_knots(3, 8, 3) if explicit else None

    def layer(*tensors):
        return kan_linear(*tensors, grid=grid)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_outside_the_grid_only_silu_remains(explicit, dtype):
    x = torch.tensor([torch.finfo(dtype).min, -80, 80, torch.finfo(dtype).max], dtype=dtype)[:, None]
    spline = torch.randn(2, 1, 8).to(dtype).requires_grad_()
    x.requires_grad_()
    y = kan_linear(x, torch.zeros(2, 1, dtype=dtype), spline, grid=some_knots(1, 8, 3) if explicit else None)
    gradients = torch.autograd.grad(y.sum(), (x, spline))
    assert (y == 0).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("bases", [8, 40])
@pytest.mark.parametrize("explicit", [False, True])
def test_nan_and_infinity_stay_in_their_row(explicit, bases):
    x, base, spline = arguments((4,), 3, 2, bases, torch.float32, "cpu")
    x[1, 0], x[3, 2] = torch.nan, torch.inf
    grid = some_knots(3, bases, 3) if explicit else None
    y = kan_linear(x, base, spline, grid=grid)
    torch.testing.assert_close(y, kan_linear(x, base, spline, grid=grid, backend="torch"), equal_nan=True)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_inputs_in_any_memory_layout():
    big, base, spline = arguments((6,), 16, 5, 8, torch.float32, "cpu")
    weights = base[:, :4].T.contiguous().T, spline[:, :4].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    dy = torch.randn(5, 6).T
    for x in (big[:, 3:7], big[:1, :4].expand(6, 4), big[:, ::4], big.T[:4].T, big[:, :4]):
        before = x.clone()
        for ours, expected in zip(
            layer_and_gradients([x, *weights], dy), layer_and_gradients([x, *weights], dy, backend="torch"), strict=True
        ):
            torch.testing.assert_close(ours, expected)
        assert torch.equal(x, before)


@pytest.mark.parametrize("sizes", list(itertools.product((0, 2), repeat=3))[:-1], ids=str)
def test_empty_inputs_give_empty_outputs(sizes):
    rows, in_features, out_features = sizes
    tensors = arguments((rows,), in_features, out_features, 8, torch.float32, "cpu")
    dy = torch.ones(rows, out_features)
    ours = layer_and_gradients(tensors, dy)
    for a, b in zip(ours, layer_and_gradients(tensors, dy, backend="torch"), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives():
    tensors = arguments((5,), 4, 3, 8, torch.float32, "cpu", spread=1.5)
    dy = torch.randn(5, 3)
    ours = second_derivatives(tensors, dy, "auto")
    exact = second_derivatives([t.double() for t in tensors], dy, "torch")
    for a, b in zip(ours, exact, strict=True):
        assert relative(a - b, b) < 2e-6


def test_transforms_of_torch_func():
    x, base, spline = arguments((5,), 4, 3, 8, torch.float64, "cpu")
    jacobians = torch.vmap(torch.func.jacrev(lambda row: kan_linear(row, base, spline)))(x)
    expected = torch.autograd.functional.jacobian(lambda x: kan_linear(x, base, spline).sum(0), x)
    torch.testing.assert_close(jacobians, expected.transpose(0, 1))


@pytest.mark.parametrize("explicit", [False, True])
def test_backward_keeps_x_the_weights_and_the_knots_only(explicit):
    tensors = [t.requires_grad_() for t in arguments((9,), 4, 3, 8, torch.float32, "cpu")]
    grid = some_knots(4, 8, 3) if explicit else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        kan_linear(*tensors, grid=grid)
    assert kept == [t.data_ptr() for t in (*tensors, *([grid] if explicit else []))]


def test_weight_gradients_are_the_same_bits_in_every_run():
    tensors = arguments((70,), 5, 3, 8, torch.float32, "cpu")
    dy = torch.randn(70, 3)
    for a, b in zip(layer_and_gradients(tensors, dy), layer_and_gradients(tensors, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [0, 4])
def test_other_orders_run_on_the_reference(order):
    tensors = arguments((4,), 3, 2, 5 + order, torch.float32, "cpu")
    expected = reference.kan_linear(*tensors, order=order, grid_range=(-3.0, 3.0))
    assert torch.equal(kan_linear(*tensors, order=order), expected)
