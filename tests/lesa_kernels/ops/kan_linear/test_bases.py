"""B-spline bases against scipy's, which share no code and no formula with ours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from lesa_kernels import bspline_basis
from lesa_kernels.ops.kan_linear import reference
from tests.lesa_kernels.splines import knots_of, scipy_bases

GRIDS = [(1, (-1.0, 1.0)), (2, (0.0, 0.5)), (5, (-3.0, 3.0)), (7, (-0.3, 4.0)), (40, (-100.0, 3.0))]


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize(("grid_size", "grid_range"), GRIDS)
def test_bases_equal_those_of_scipy(order, grid_size, grid_range):
    knots = knots_of(grid_size, order, grid_range)
    width = knots[1] - knots[0]
    between = np.linspace(knots[0] - 2.03 * width, knots[-1] + 2 * width, 509)
    on = knots if order else knots[:0]  # scipy includes both ends of an interval in order 0
    x = np.concatenate([between, on, [-1e6, 1e6]])
    bases = bspline_basis(torch.from_numpy(x), grid_size=grid_size, order=order, grid_range=grid_range)
    assert bases.shape == (len(x), grid_size + order)
    np.testing.assert_allclose(bases.numpy(), scipy_bases(x, knots, order), rtol=0, atol=1e-11)


def test_order_zero_is_a_step_closed_on_the_left():
    x = torch.tensor([-1.0, 0.0, 1.0])
    bases = bspline_basis(x, grid_size=2, order=0, grid_range=(-1.0, 1.0))
    assert bases.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    grid_size=st.integers(1, 30),
    order=st.integers(1, 5),
    low=st.floats(-50, 50),
    width=st.floats(0.05, 100),
    where=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_bases_are_a_partition_of_unity_inside_the_range(grid_size, order, low, width, where):
    x = low + torch.tensor(where, dtype=torch.float64) * width
    bases = bspline_basis(x, grid_size=grid_size, order=order, grid_range=(low, low + width))
    torch.testing.assert_close(bases.sum(-1), torch.ones_like(x), rtol=0, atol=1e-9)
    assert (bases >= -1e-12).all()
    assert ((bases > 1e-12).sum(-1) <= order + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bases_are_rounded_once(dtype):
    x = torch.linspace(-8, 8, 1001).to(dtype)
    bases = bspline_basis(x, grid_size=5, order=3, grid_range=(-3.0, 3.0))
    exact = torch.from_numpy(scipy_bases(x.double().numpy(), knots_of(5, 3, (-3.0, 3.0)), 3))
    assert bases.dtype == dtype
    unit = max(torch.finfo(dtype).eps / 2, 5 * torch.finfo(torch.float32).eps)
    assert ((bases.double() - exact).abs() <= unit * exact + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bases_far_outside_the_grid_are_zero(dtype):
    x = torch.tensor([-torch.inf, torch.finfo(dtype).min, torch.finfo(dtype).max, torch.inf], dtype=dtype)
    x.requires_grad_()
    bases = bspline_basis(x, grid_size=50, order=3, grid_range=(-0.1, 0.1))
    bases.sum().backward()
    assert (bases == 0).all()
    assert (x.grad == 0).all()


def test_nan_stays_nan():
    assert bspline_basis(torch.tensor([torch.nan]), grid_size=5).isnan().all()


@pytest.mark.parametrize("order", [2, 3, 4])
def test_gradients_of_the_reference(order):
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def bases(x):
        return bspline_basis(x, grid_size=4, order=order, grid_range=(-1.3, 1.1))

    assert torch.autograd.gradcheck(bases, x)
    assert order == 2 or torch.autograd.gradgradcheck(bases, x)  # second derivatives of order 2 are not continuous


def test_knots_may_repeat():
    knots = torch.tensor([0.0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3], dtype=torch.float64)
    x = torch.linspace(-0.5, 3.5, 83, dtype=torch.float64)
    expected = np.nan_to_num(BSpline(knots.numpy(), np.eye(7), 3, extrapolate=False)(x.numpy()))
    np.testing.assert_allclose(reference.cox_de_boor(x, knots, 3).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"grid_size": 0}, {"order": -1}, {"grid_range": (1.0, 1.0)}])
def test_invalid_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="grid"):
        bspline_basis(torch.zeros(3), **wrong)
