"""KANLinear and KAN against a float64 model of efficient-kan written from its formula."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline, make_interp_spline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lesa_kernels import KAN, KANLinear
from tests.lesa_kernels.splines import knots_of, scipy_bases


def model64(state: dict[str, torch.Tensor], x: torch.Tensor, order: int = 3) -> np.ndarray:
    """y_o = sum_i base[o, i] silu(x_i) + sum_ig scaler[o, i] spline[o, i, g] B_g(x_i), on the knots in ``state``."""
    arrays = {name: value.double().numpy() for name, value in state.items()}
    x = x.double().numpy()
    y = x / (1 + np.exp(-x)) @ arrays["base_weight"].T
    for i, knots in enumerate(arrays["grid"]):
        scaled = arrays["spline_scaler"][:, i, None] * arrays["spline_weight"][:, i]
        y = y + scipy_bases(x[:, i], knots, order) @ scaled.T
    return y


def trained(*sizes: int, **options) -> KANLinear:
    """A layer with spline weights of the size that they have after training."""
    layer = KANLinear(*sizes, **options)
    with torch.no_grad():
        layer.spline_weight.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(("grid_size", "order", "grid_range"), [(5, 3, (-3, 3)), (5, 3, (-1, 1)), (9, 2, (0.0, 0.7))])
def test_the_layer_equals_efficient_kans(grid_size, order, grid_range):
    layer = trained(4, 3, grid_size=grid_size, spline_order=order, grid_range=grid_range)
    x = torch.cat([torch.randn(60, 4) * 3, layer.grid.T])
    np.testing.assert_allclose(
        layer(x).detach(), model64(layer.state_dict(), x, order), atol=2e-6 * grid_size, rtol=1e-5
    )


def test_the_state_dict_has_the_keys_of_efficient_kan():
    layer = KANLinear(4, 3, grid_size=6, spline_order=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"base_weight": (3, 4), "spline_weight": (3, 4, 8), "spline_scaler": (3, 4), "grid": (4, 11)}
    np.testing.assert_allclose(layer.grid[0], knots_of(6, 2, (-1.0, 1.0)), atol=1e-6)
    assert "spline_scaler" not in KANLinear(4, 3, enable_standalone_scale_spline=False).state_dict()
    assert {name.split(".", 2)[1] for name in KAN([4, 3, 2]).state_dict()} == {"0", "1"}


def test_knots_computed_in_float32_count_as_uniform():
    """As efficient-kan computes them: ``arange(-k, G + k + 1) * h + low`` in float32."""
    layer = trained(4, 3, grid_range=(-3, 3))
    state = layer.state_dict()
    state["grid"] = (torch.arange(-3, 9) * 1.2 - 3).expand(4, -1).contiguous()
    layer.load_state_dict(state)
    assert layer.has_uniform_grid


def test_rounded_knots_are_used_as_they_are():
    layer = trained(4, 3, grid_range=(-3, 3))
    rounded = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(rounded)
    assert not layer.has_uniform_grid
    x = torch.randn(50, 4) * 2
    exact = model64(rounded, x)
    np.testing.assert_allclose(layer(x).detach(), exact, atol=1e-5)
    uniform = rounded | {"grid": torch.from_numpy(knots_of(5, 3, (-3.0, 3.0))).expand(4, -1)}
    assert np.abs(model64(uniform, x) - exact).max() > 1e-3  # uniform knots would give another function
    assert KANLinear(4, 3, grid_range=(-3, 3)).has_uniform_grid


def test_outside_the_grid_only_silu_remains():
    layer = trained(4, 3)
    x = torch.tensor([-1e4, -2.21, 2.21, 3e4])[:, None].expand(4, 4)
    torch.testing.assert_close(layer(x), torch.nn.functional.silu(x) @ layer.base_weight.T)
    torch.nn.init.zeros_(layer.base_weight)
    assert (layer(x) == 0).all()


@pytest.mark.parametrize("explicit", [False, True])
def test_saved_pickled_and_copied_layers_give_the_same_outputs(explicit):
    layer = trained(4, 3)
    x = torch.randn(30, 4)
    if explicit:
        layer.update_grid(x)
    fresh = KANLinear(4, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    for other in (fresh, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert other.has_uniform_grid == (not explicit)
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("explicit", [False, True])
def test_half_precision_modules(dtype, explicit):
    layer = trained(4, 3).to(dtype)
    x = torch.randn(200, 4).to(dtype)
    if explicit:
        layer.update_grid(x)
    assert layer.grid.dtype == torch.float32
    y = layer(x)
    exact = model64(layer.state_dict(), x)
    assert y.dtype == dtype
    assert np.abs(y.detach().double().numpy() - exact).max() <= 3 * torch.finfo(dtype).eps * np.abs(exact).max()
    fresh = KANLinear(4, 3).to(dtype)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    assert layer.float()(x.float()).dtype == torch.float32


def test_autocast_with_explicit_knots():
    layer = trained(4, 3)
    x = torch.randn(100, 4)
    layer.update_grid(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - layer(x)).abs().max() < 0.05


@pytest.mark.parametrize("grid_eps", [0.02, 1.0])
def test_update_grid_keeps_a_function_that_the_new_grid_can_represent(grid_eps):
    """Cubic polynomials are splines on any knots, so a fit is exact and stays so on the knots of other data."""
    layer = KANLinear(2, 3, grid_eps=grid_eps, grid_range=(-3, 3)).double()
    x = torch.rand(400, 2, dtype=torch.float64) * 5 - 2.5
    curves = torch.stack([x**3 / 9 - x, 0.3 * x**2 + 1, x], dim=-1)  # [batch, in, out]
    with torch.no_grad():
        layer.spline_weight.copy_(layer.curve2coeff(x, curves))
    expected = layer(x)
    inside = x[x.abs().amax(1) < 1.5]
    layer.update_grid(inside)
    assert not layer.has_uniform_grid
    assert layer.grid.min() < -1.51
    torch.testing.assert_close(layer(inside), expected[x.abs().amax(1) < 1.5], rtol=0, atol=1e-6)


def test_update_grid_changes_a_function_only_by_the_error_of_the_fit():
    layer = trained(3, 2)
    x = torch.randn(300, 3)
    before, old = layer(x).detach().numpy(), copy.deepcopy(layer.state_dict())
    layer.update_grid(x)
    change = np.zeros((300, 2))
    for i in range(3):
        points = x[:, i].double().numpy()
        scaled = old["spline_scaler"][:, i, None] * old["spline_weight"][:, i]
        curves = scipy_bases(points, old["grid"][i].double().numpy(), 3) @ scaled.double().numpy().T
        bases = scipy_bases(points, layer.grid[i].double().numpy(), 3)
        change += bases @ np.linalg.lstsq(bases, curves)[0] - curves
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(layer(x).detach().numpy() - before, change, atol=1e-5)


def test_a_second_update_grid_changes_nothing():
    layer = trained(3, 2)
    x = torch.randn(500, 3)
    layer.update_grid(x)
    once = layer(x).detach()
    layer.update_grid(x)
    torch.testing.assert_close(layer(x), once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [torch.full((40, 3), 0.3), torch.tensor([[-0.5], [0.5]]).repeat(9, 3), torch.zeros(1, 3), torch.eye(3)],
    ids=["one point", "two points", "one sample", "mostly zero"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_grid_with_repeated_samples(x, dtype):
    layer = trained(3, 2).to(dtype)
    x = x.to(dtype)
    before = layer(x).detach()
    layer.update_grid(x)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert (layer.grid.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(layer(x), before, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0.02)
    assert layer(torch.linspace(-3, 3, 50, dtype=dtype)[:, None].expand(50, 3)).isfinite().all()


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor([[0.0, torch.nan, 1.0]])], ids=["none", "nan"])
def test_update_grid_refuses_inputs_without_a_range(x):
    layer = trained(3, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="finite"):
        layer.update_grid(x)
    assert layer.has_uniform_grid
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_update_grid_allocates_no_curves_of_all_edges_at_once():
    layer = KANLinear(20, 1000)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        layer.update_grid(torch.randn(100, 20))
    assert max(sizes) < 100 * 20 * 1000


def test_regularization_loss_is_the_formula():
    layer = trained(4, 3)
    size = layer.spline_weight.detach().abs().mean(-1).double().numpy()
    share = size / size.sum()
    expected = 0.7 * size.sum() - 0.2 * (share * np.log(share)).sum()
    assert layer.regularization_loss(0.7, 0.2).item() == pytest.approx(expected, rel=1e-5)
    model = KAN([4, 3, 2])
    parts = [part.regularization_loss(0.7, 0.2) for part in model.layers]
    torch.testing.assert_close(model.regularization_loss(0.7, 0.2), parts[0] + parts[1])


@pytest.mark.parametrize("zeros", [1, 3], ids=["a pruned edge", "all edges"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regularization_loss_of_zero_edges_is_finite(zeros, dtype):
    layer = trained(1, 3).to(dtype)
    with torch.no_grad():
        layer.spline_weight[:zeros] = 0
    loss = layer.regularization_loss()
    loss.backward()
    assert loss.isfinite()
    assert layer.spline_weight.grad.isfinite().all()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_to_bsplines_gives_the_same_function_for_all_inputs(order, explicit):
    layer = trained(3, 2, spline_order=order, grid_range=(-2, 3)).double()
    if explicit:
        layer.update_grid(torch.randn(90, 3))
    x = torch.linspace(-30, 30, 991, dtype=torch.float64)[:, None].expand(991, 3)
    splines = layer.to_bsplines()
    expected = sum(spline(column) for spline, column in zip(splines, x.T.numpy(), strict=True))
    with torch.no_grad():
        layer.base_weight.zero_()
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-12)
    back = KANLinear.from_bsplines(splines, dtype=torch.float64)
    assert (back.has_uniform_grid, back.grid_size) == (layer.has_uniform_grid, layer.grid_size)
    torch.testing.assert_close(back(x), layer(x))
    torch.testing.assert_close(back.grid, layer.grid)
    torch.testing.assert_close(back.spline_weight, layer.scaled_spline_weight)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_interpolating_splines_are_exact_up_to_their_last_point(order, dtype):
    """scipy's interpolating splines have knots that repeat at both ends."""
    x = np.arange(8)[:, None] + 0.3 * np.random.default_rng(0).random((8, 2))
    y = np.random.default_rng(1).standard_normal((2, 8, 4))
    splines = [make_interp_spline(x[:, i], y[i], k=order) for i in range(2)]
    layer = KANLinear.from_bsplines(splines, dtype=dtype)
    inside = np.concatenate([x, x[0] + np.linspace(0, 1, 40)[:, None] * (x[-1] - x[0])])
    inside = torch.from_numpy(inside).to(dtype)
    expected = splines[0](inside[:, 0].double().numpy()) + splines[1](inside[:, 1].double().numpy())
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(layer(inside).detach(), expected, atol=tolerance)
    np.testing.assert_allclose(layer(torch.from_numpy(x).to(dtype)).detach(), y.sum(0), atol=tolerance)


def test_splines_that_do_not_form_a_layer_are_refused():
    knots, c = np.arange(12.0), np.ones((8, 2))
    spline = BSpline(knots, c, 3)
    for others in (
        [],
        [spline, BSpline(knots, np.ones((9, 2)), 2)],
        [spline, BSpline(knots, c[:, :1], 3)],
        [BSpline(knots, np.ones((8, 2, 2)), 3)],
        [BSpline(knots, c * 1j, 3)],
    ):
        with pytest.raises(ValueError, match=r"splines|coefficients"):
            KANLinear.from_bsplines(others)
    one = KANLinear.from_bsplines([BSpline(knots, np.ones(8), 3)])
    assert (one.in_features, one.out_features) == (1, 1)
    assert KANLinear.from_bsplines([BSpline(knots, c * 0, 3)])(torch.ones(2, 1)).abs().max() == 0


@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.Tanh])
def test_other_base_activations(activation):
    layer = trained(3, 2, base_activation=activation)
    x = torch.randn(20, 3)
    y = layer(x)
    expected = model64(layer.state_dict() | {"base_weight": torch.zeros(2, 3)}, x)
    expected += (activation()(x) @ layer.base_weight.T).detach().double().numpy()
    np.testing.assert_allclose(y.detach(), expected, atol=1e-5)


def test_a_stack_runs_trains_and_updates_its_grids():
    model = KAN([3, 6, 2], grid_range=(-3, 3))
    x = torch.randn(64, 3)
    state = {name.removeprefix("layers.0."): v for name, v in model.state_dict().items() if "layers.0" in name}
    hidden = torch.from_numpy(model64(state, x)).float()
    torch.testing.assert_close(model.layers[1](hidden), model(x), rtol=1e-4, atol=1e-5)
    model(x, update_grid=True)
    assert not any(layer.has_uniform_grid for layer in model.layers)
    loss = model(x).square().mean() + 1e-3 * model.regularization_loss()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_layer_on_meta_keeps_its_knots():
    layer = KANLinear(3, 2).to("meta")
    assert layer.grid.is_meta
    assert layer.to(torch.bfloat16).grid.dtype == torch.float32
    assert repr(layer).startswith("KANLinear(")
