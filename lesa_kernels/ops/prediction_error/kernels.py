# ruff: noqa: N803 (compile-time constants are written in capitals)
# mypy: ignore-errors
# (functions of Triton have no Python types)
"""The Triton kernel of ``prediction_error``.

    error = sum_i (feature[i] - sum_j coefficients[j] * history[j, i] - bias)^2        size = sum_i feature[i]^2

Lengths and strides are passed divided by VEC, the elements of 16 bytes: see the kernels of ``combine``.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_stride_vec", "length_vec", "steps"])
def prediction_error_kernel(
    history,  # [M, length], rows row_stride apart
    coefficients,  # float32 [M]
    bias,  # float32 [1], or None
    feature,  # [length]
    sums,  # float32 [2, programs]: error and size, program by program
    row_stride_vec,
    length_vec,
    steps,
    M: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """A span of ``steps`` blocks. Squares are added up in the lane, lanes at the end, programs by the caller."""
    program = tl.program_id(0).to(tl.int64)
    length = length_vec.to(tl.int64) * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC
    element = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]  # [LANES, VEC]
    error = tl.zeros([LANES], dtype=tl.float32)
    size = tl.zeros([LANES], dtype=tl.float32)
    for step in range(steps):
        offsets = (program * steps + step) * (LANES * VEC) + element
        inside = offsets < length
        truth = tl.load(feature + offsets, mask=inside, other=0.0).to(tl.float32)
        rest = truth
        if bias is not None:
            rest -= tl.load(bias)
        for j in tl.static_range(M):
            value = tl.load(history + j * row_stride + offsets, mask=inside, other=0.0).to(tl.float32)
            rest -= tl.load(coefficients + j) * value
        rest = tl.where(inside, rest, 0.0)
        error += tl.sum(rest * rest, axis=1)
        size += tl.sum(truth * truth, axis=1)
    tl.store(sums + program, tl.sum(error, axis=0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(size, axis=0))
