"""How launches divide work into programs."""

from hypothesis import given
from hypothesis import strategies as st

from lesa_kernels.launching import FULL_GPU, steps_of_program


@given(st.integers(1, 10**9), st.integers(1, 64))
def test_programs_of_a_reduction_fill_the_gpu_before_they_take_several_blocks(blocks, most):
    steps = steps_of_program(blocks, most)
    assert 1 <= steps <= most
    assert steps == 1 or -(-blocks // steps) >= FULL_GPU


def test_large_features_take_as_many_blocks_as_allowed():
    assert steps_of_program(10**6, 16) == 16
