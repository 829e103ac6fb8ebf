"""``prediction_error``: every implementation against float64."""

import pytest
import torch

from lesa_kernels import combine, prediction_error
from tests.lesa_kernels.memcheck import memcheck

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(m, feature, dtype=torch.float32, device="cpu", bias=True):
    """A history, coefficients, and a feature that differs from their combination by about a tenth."""
    history = torch.randn(m, *feature, device=device).to(dtype)
    coefficients = torch.randn(m, device=device)
    shift = torch.tensor(0.5, device=device) if bias else None
    made = combine(history, coefficients[None], None if shift is None else shift[None])[0]
    return history, coefficients, (made + 0.1 * torch.randn(feature, device=device)).to(dtype), shift


def exact(history, coefficients, feature, bias):
    made = torch.einsum("m,m...->...", coefficients.double(), history.double()) + (0 if bias is None else bias.double())
    return torch.stack([(feature.double() - made).square().sum(), feature.double().square().sum()])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "feature"), [(1, (7,)), (5, (2, 3, 24)), (13, (3, 13)), (3, (40, 128)), (40, (8,))])
def test_error_and_squared_norm_match_float64(m, feature, bias, dtype, backend, device):
    given = inputs(m, feature, dtype, device, bias)
    torch.testing.assert_close(prediction_error(*given, backend=backend), exact(*given), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 5, 3 << 16])
def test_features_of_several_chunks(size):
    given = inputs(2, (size,))
    torch.testing.assert_close(prediction_error(*given), exact(*given), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_history_may_be_any_view(backend, device):
    history, coefficients, feature, bias = inputs(3, (4, 16), torch.bfloat16, device)
    for view in (history.transpose(1, 2).contiguous().transpose(1, 2), history.repeat(2, 1, 1)[::2], history.flip(0)):
        given = (view, coefficients[: len(view)], feature, bias)
        torch.testing.assert_close(prediction_error(*given, backend=backend), exact(*given), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("feature", [(7,), (2, 520), (3, 24)])
def test_the_kernel_stays_within_its_tensors(feature, device):
    if device.type != "cpu":
        pytest.skip("the interpreter checks addresses")
    given = inputs(3, feature, torch.bfloat16, device)
    with memcheck(*given):
        prediction_error(*given, backend="triton")


def test_an_infinite_feature_gives_infinity_and_an_empty_one_zero():
    history, coefficients, feature, bias = inputs(2, (6,))
    feature[3] = float("inf")
    assert not prediction_error(history, coefficients, feature, bias).isfinite().any()
    assert prediction_error(torch.zeros(2, 0), coefficients, torch.zeros(0)).tolist() == [0, 0]


def test_gradients_match_finite_differences():
    given = [t.double().requires_grad_() for t in inputs(3, (2, 5))]
    assert torch.autograd.gradcheck(prediction_error, given)


def test_compiled_code_calls_the_operation(device):
    given = inputs(3, (4, 16), device=device)
    compiled = torch.compile(lambda *a: prediction_error(*a, backend="triton"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), prediction_error(*given, backend="triton"))


@pytest.mark.parametrize(
    ("name", "change"),
    [("coefficients", (1, torch.zeros(4))), ("feature", (2, torch.zeros(7))), ("bias", (3, torch.zeros(1)))],
)
def test_wrong_shapes_are_named_in_the_error(name, change):
    given = list(inputs(3, (6,)))
    given[change[0]] = change[1]
    with pytest.raises(ValueError, match=name):
        prediction_error(*given)
