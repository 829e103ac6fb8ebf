"""What only a GPU can show. Every test of this folder needs one, and is skipped without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lesa_kernels import combine, fused_output_head, gram_row, kan_linear, kan_predict, prediction_error, token_means

OPERATIONS = (
    "combine",
    "gram_row",
    "prediction_error",
    "fused_output_head",
    "weighted sum",
    "kan_linear",
    "kan_predict",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/native/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)


def call_of(operation: str, device: torch.device | str = "cuda") -> Callable[[], Tensor]:
    """A call of an operation in bf16 with everything on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    history, coefficients, bias = normal(8, 1, 256, 384, dtype=torch.bfloat16), normal(6, 8), normal(6)
    multiplier, addend, weight = normal(6, 1, 384), normal(6, 1, 384), normal(64, 384, dtype=torch.bfloat16)
    x, base = normal(300, 64, dtype=torch.bfloat16), normal(64, 64, dtype=torch.bfloat16)
    spline, gates = normal(64, 64, 8, dtype=torch.bfloat16), normal(6, 3).sigmoid()
    linear, splines, means = normal(3, 8) / 32, normal(3, 8, 8) / 32, token_means(history)
    shares = torch.full((6,), 1 / 6, device=device)
    head = history, coefficients, None, multiplier, addend, weight
    calls: dict[str, Callable[[], Tensor]] = {
        "combine": lambda: combine(history, coefficients, bias),
        "gram_row": lambda: gram_row(history, history[-1]),
        "prediction_error": lambda: prediction_error(history, coefficients[0], history[-1], bias[0]),
        "fused_output_head": lambda: fused_output_head(*head, means=means),
        "weighted sum": lambda: fused_output_head(*head, means=means, weights=shares),
        "kan_linear": lambda: kan_linear(x, base, spline),
        "kan_predict": lambda: kan_predict(history, gates, linear, linear, splines, bias[:3]),
    }
    return calls[operation]


@contextmanager
def no_host_wait() -> Iterator[None]:
    """Everything that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
