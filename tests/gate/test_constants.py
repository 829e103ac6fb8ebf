"""Integers equal to 1, which Triton passes to a kernel as compile-time constants; no GPU is needed."""

import pytest

KERNELS = {"combine": 2, "fused_output_head": 1, "kan_linear": 5, "kan_predict": 2, "prediction_error": 1}


@pytest.mark.parametrize("operation", KERNELS)
def test_kernels_compile_if_integers_are_1(compiled, operation) -> None:
    """A feature of one vector, one channel, one token: a constant has no ``.to``, and a range over it is unrolled."""
    assert len(compiled(operation, "--ones")) == KERNELS[operation]
