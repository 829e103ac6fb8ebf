"""Wrong arguments of every operation are refused before any work, with a message that names the argument."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lesa_kernels import (
    KAN,
    KANLinear,
    bspline_basis,
    combine,
    fused_output_head,
    gram_row,
    kan_linear,
    kan_predict,
    prediction_error,
    token_means,
)
from lesa_kernels.ops.kan_linear import reference
from lesa_kernels.overlap import overlap

HEAD = {
    "history": (3, 2, 4, 8),
    "coefficients": (5, 3),
    "bias": (5,),
    "multiplier": (5, 2, 8),
    "addend": (5, 1, 8),
    "weight": (6, 8),
}
OPERATIONS = {
    "combine": (combine, {"history": (3, 2, 4, 8), "coefficients": (5, 3), "bias": (5,), "out": (5, 2, 4, 8)}),
    "gram_row": (gram_row, {"history": (3, 8), "feature": (8,)}),
    "fused_output_head": (fused_output_head, {**HEAD, "projection_bias": (6,), "means": (3, 2, 4)}),
    "weighted sum": (fused_output_head, {**HEAD, "weights": (5,)}),
    "token_means": (token_means, {"feature": (2, 4, 8)}),
    "bspline_basis": (bspline_basis, {"x": (4, 3)}),
    "kan_linear": (
        kan_linear,
        {"x": (4, 3), "base_weight": (2, 3), "spline_weight": (2, 3, 8), "grid": (3, 12)},
    ),
    "kan_predict": (
        kan_predict,
        {
            "history": (3, 4, 8),
            "gates": (5, 2),
            "linear_weight": (2, 3),
            "base_weight": (2, 3),
            "spline_weight": (2, 3, 8),
            "bias": (2,),
            "scale": (8,),
        },
    ),
    "prediction_error": (prediction_error, {"history": (3, 2, 8), "coefficients": (3,), "feature": (2, 8), "bias": ()}),
}
ARGUMENTS = [(name, argument) for name, (_, shapes) in OPERATIONS.items() for argument in shapes]


def call(name: str, device: str = "cpu", **changed: object):
    function, shapes = OPERATIONS[name]
    tensors = {argument: torch.ones(shape, device=device) for argument, shape in shapes.items()}
    return function(**(tensors | changed))


def tensor_of(name: str, argument: str) -> Tensor:
    return torch.ones(OPERATIONS[name][1][argument])


@pytest.mark.parametrize("name", OPERATIONS)
def test_correct_arguments_are_accepted(name):
    call(name)


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, a in ARGUMENTS if len(OPERATIONS[n][1]) > 1])
def test_tensors_on_two_devices_are_refused(name, argument):
    with pytest.raises(ValueError, match=r"is on meta, \w+ on cpu|is on cpu, \w+ on meta"):
        call(name, **{argument: tensor_of(name, argument).to("meta")})


@pytest.mark.parametrize("name", OPERATIONS)
def test_meta_tensors_give_the_shapes_of_the_result(name):
    expected, result = call(name), call(name, "meta")
    for real, fake in zip(*((r if isinstance(r, tuple) else (r,)) for r in (expected, result)), strict=True):
        assert fake.is_meta
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "name", ["combine", "fused_output_head", "weighted sum", "kan_linear", "kan_predict", "prediction_error"]
)
def test_gradients_on_meta_have_the_shapes_of_the_arguments(name):
    function, shapes = OPERATIONS[name]
    tensors = {a: torch.ones(s, device="meta").requires_grad_() for a, s in shapes.items() if a not in ("out", "means")}
    for tensor, gradient in zip(
        tensors.values(), torch.autograd.grad(function(**tensors).sum(), list(tensors.values())), strict=True
    ):
        assert gradient.is_meta
        assert gradient.shape == tensor.shape


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_tensors_that_are_not_real_floats_are_refused(name, argument, dtype):
    with pytest.raises(ValueError, match=f"{argument} is {dtype}"):
        call(name, **{argument: tensor_of(name, argument).to(dtype)})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize(
    ("convert", "message"),
    [(Tensor.numpy, "torch.as_tensor"), (list, "torch.stack"), (lambda t: 2.0, "float"), (str, "str")],
    ids=["numpy", "list", "number", "text"],
)
def test_an_argument_that_is_no_tensor_is_named(name, argument, convert, message):
    if convert is list and tensor_of(name, argument).ndim == 0:
        pytest.skip("no list")
    with pytest.raises(ValueError, match=f"^{argument} must be a tensor, not .*{message}"):
        call(name, **{argument: convert(tensor_of(name, argument))})


@pytest.mark.parametrize("name", ["combine", "gram_row", "fused_output_head", "kan_predict", "prediction_error"])
def test_a_history_without_dimensions_is_refused(name):
    with pytest.raises(ValueError, match=r"\[\]"):
        call(name, history=torch.ones(()))


@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf, None, "1e-6", True], ids=str)
def test_eps_must_be_a_number_of_at_least_zero(eps):
    with pytest.raises(ValueError, match=r"eps must be a finite number"):
        call("fused_output_head", eps=eps)
    call("fused_output_head", eps=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": 2.5}, "grid_size must be a whole number, not 2.5"),
        ({"grid_size": True}, "grid_size"),
        ({"grid_size": 0}, "grid_size >= 1"),
        ({"order": 2.0}, "order must be a whole number"),
        ({"grid_range": (0, math.inf)}, "finite"),
        ({"grid_range": (math.nan, 1)}, "finite"),
        ({"grid_range": 3}, "two numbers"),
        ({"grid_range": (1, 2, 3)}, "two numbers"),
        ({"grid_range": "ab"}, "two numbers"),
    ],
    ids=str,
)
def test_invalid_grids_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bspline_basis(torch.ones(3), **change)
    if "grid_size" not in change:
        for name in ("kan_linear", "kan_predict"):
            with pytest.raises(ValueError, match=message):
                call(name, **change)
    renamed = {"spline_order" if name == "order" else name: value for name, value in change.items()}
    for make in (lambda **options: KANLinear(3, 2, **options), lambda **options: KAN([3, 2], **options)):
        with pytest.raises(ValueError, match=message):
            make(**renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"grid_eps": math.nan}, "grid_eps"), ({"grid_eps": -0.1}, "grid_eps"), ({"grid_eps": 1.1}, "grid_eps")],
    ids=str,
)
def test_layer_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KANLinear(3, 2, **change)
    with pytest.raises(ValueError, match="in_features"):
        KANLinear(2.5, 2)
    for margin in (-1.0, math.nan):
        with pytest.raises(ValueError, match="margin"):
            KANLinear(3, 2).update_grid(torch.randn(9, 3), margin=margin)


@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.Tanh])
def test_a_layer_refuses_integers(activation):
    layer = KANLinear(3, 2, base_activation=activation)
    for use in (layer, layer.b_splines, layer.update_grid):
        with pytest.raises(ValueError, match=r"x is torch.int64"):
            use(torch.ones(4, 3, dtype=torch.int64))


def test_sizes_may_be_numpys_integers():
    assert bspline_basis(torch.ones(3), grid_size=np.int64(4)).shape == (3, 7)


@pytest.mark.parametrize("order", [2, 3])
def test_explicit_knots_have_the_gradient_of_the_reference(order):
    x, base, spline = torch.randn(6, 3), torch.randn(2, 3), torch.randn(2, 3, 5 + order)
    knots = torch.linspace(-4, 4, 6 + 2 * order).repeat(3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(kan_linear(x, base, spline, order=order, grid=knots).sum(), knots)
    y = reference.kan_linear(x, base, spline, order=order, grid_range=(-3.0, 3.0), grid=knots)
    assert torch.equal(gradient, torch.autograd.grad(y.sum(), knots)[0])
    assert gradient.any()


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("0:3", "3:6", False),
        ("0:3", "2:5", True),
        ("0:3", "0:3", True),
        ("0:2", "0", True),
        ("::2", "1::2", False),
        ("::2", "::3", True),
        (":, 0", ":, 1", False),
        (":, 0:2", ":, 1:3", True),
        ("..., :4", "..., 4:", False),
        ("..., :5", "..., 4:", True),
        ("..., ::2", "..., 1::2", False),
        ("..., ::2", "..., 1::3", True),
        ("0:3, 3:", "2:5, :3", False),
        ("1:1", "0:3", False),
    ],
)
def test_overlapping_memory_is_detected_for_any_strides(first, second, shared):
    room = torch.zeros(6, 4, 8)
    one, other = (eval(f"room[{text}]", {"room": room}) for text in (first, second))
    assert overlap(one, other) == overlap(other, one) == overlap(one.transpose(0, -1), other) == shared
    places = torch.arange(room.numel()).view(room.shape)
    numbers = [set(eval(f"places[{text}]", {"places": places}).flatten().tolist()) for text in (first, second)]
    assert bool(numbers[0] & numbers[1]) == shared


def test_overlapping_memory_is_detected_across_storages_and_dtypes():
    array = np.zeros(64, np.float32)
    one, other = torch.from_numpy(array), torch.from_numpy(array[40:])
    assert overlap(one, other)
    assert overlap(one.view(torch.bfloat16)[100:101], other)
    assert not overlap(one[:40], other)
    assert overlap(one[50:51].expand(7), other)
    assert not overlap(one, torch.zeros(64))
    assert not overlap(one.to("meta"), one.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_out_that_overlaps_the_history_is_refused(dtype, backend):
    room = torch.randn(8, 2, 16).to(dtype)
    history, coefficients = room[2:5], torch.randn(3, 3, dtype=torch.promote_types(dtype, torch.float32))
    before = room.clone()
    for out in (history, room[3:6], room[:3], room[2:5, :1].expand(3, 2, 16)):
        with pytest.raises(ValueError, match="out shares memory with history"):
            combine(history, coefficients, out=out, backend=backend)
    assert torch.equal(room, before)
    for out in (room[5:8], room[5:8].clone()):
        expected = combine(history, coefficients, backend=backend)
        assert torch.equal(combine(history, coefficients, out=out, backend=backend), expected)


def test_out_that_overlaps_coefficients_or_bias_is_refused():
    numbers = torch.randn(3, 3)
    with pytest.raises(ValueError, match="out shares memory with coefficients"):
        combine(torch.randn(3, 3), numbers, out=numbers)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        combine(torch.randn(3, 3), torch.randn(3, 3), numbers[:, 0], out=numbers)


def test_out_beside_the_history_in_one_buffer_is_written():
    room = torch.randn(3, 2, 16)
    expected = combine(room[..., :8].contiguous(), torch.eye(3))
    assert torch.equal(combine(room[..., :8], torch.eye(3), out=room[..., 8:]), expected)
