# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
# mypy: ignore-errors
# (functions of Triton have no Python types)
"""Triton kernels of ``combine`` on flat memory; ``launch.py`` chooses block sizes.

    out[p, i]     = sum_j c[p, j, .] * history[j, i] + bias[p, .]        combine_kernel
    dots[p, j, .] = sum_i left[p, i] * history[j, i]                     dots_kernel: gradients, and Gram rows

A feature consists of ``segments`` of ``length`` elements; coefficients vary along a segment or between segments:

    shared        one segment, the whole feature; the coefficient is a scalar
    per sample    a segment a sample; the coefficient is a scalar, found by the segment
    per channel   a segment a token, its elements are the channels; the coefficient is a vector, found by the element

Lengths and strides are passed divided by VEC, the elements of 16 bytes, and multiplied by it here: Triton specialises
integers on multiples of 16 only, and would read multiples of 8, which are usual in bf16, two bytes at a time. VEC = 1
for unaligned data. They are not specialised on their values: a 1 would become a constant, which has no ``.to``. Offsets
are 64-bit, since a history may have more than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_stride_vec", "length_vec"])
def combine_kernel(
    history,  # [M, segments * length], rows row_stride apart
    coefficients,  # float32 [P, M, segments or length]
    bias,  # float32 [P, segments or length], or None
    out,  # [P, segments * length]
    row_stride_vec,
    length_vec,
    segments,
    P: tl.constexpr,
    M: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of BLOCK elements of a segment for all P predictions: M loads into registers, then P sums."""
    program = tl.program_id(0)
    # neighbouring programs use the same channels of neighbouring tokens, so they share coefficients in L2
    segment = (program % segments).to(tl.int64)
    inside = (program // segments).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = length_vec.to(tl.int64) * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC
    mask = inside < length
    offsets = segment * length + inside
    row_size = segments * length

    values = ()
    for j in tl.static_range(M):
        values += (tl.load(history + j * row_stride + offsets, mask=mask, other=0.0).to(tl.float32),)

    for p in tl.static_range(P):
        total = tl.zeros([BLOCK], dtype=tl.float32)
        if PER_CHANNEL:
            if bias is not None:
                total += tl.load(bias + p * length + inside, mask=mask, other=0.0)
            for j in tl.static_range(M):
                total += tl.load(coefficients + (p * M + j) * length + inside, mask=mask, other=0.0) * values[j]
        else:
            if bias is not None:
                total += tl.load(bias + p * segments + segment)
            for j in tl.static_range(M):
                total += tl.load(coefficients + (p * M + j) * segments + segment) * values[j]
        tl.store(out + p * row_size + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_stride_vec", "length_vec", "steps"])
def dots_kernel(
    left,  # [P, segments * length]
    history,  # [M, segments * length], rows row_stride apart
    dots,  # float32 [spans, P, M, segments or length]
    sums,  # float32 [spans, P, segments or length], sums of left alone: the gradient of the bias; or None
    row_stride_vec,
    length_vec,
    segments,
    steps,
    P: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """One span of ``steps`` blocks, for all P rows of left and GROUP rows of history (the second grid axis).

    A lane holds VEC neighbouring elements. Their products are added in the lane, except per channel, where every
    element has its own sum. The caller adds the spans in a fixed order, so every run gives the same bits.
    """
    BLOCK: tl.constexpr = LANES * VEC
    program = tl.program_id(0)
    first = tl.program_id(1) * GROUP
    length = length_vec.to(tl.int64) * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC
    row_size = segments * length
    element = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]  # [LANES, VEC]

    if PER_CHANNEL:  # a span of tokens, and one block of their channels
        blocks = tl.cdiv(length_vec * VEC, BLOCK)
        span = (program // blocks).to(tl.int64)
        inside = (program % blocks).to(tl.int64) * BLOCK + element
        mask = inside < length
    else:  # a span of blocks of one segment
        span = (program // segments).to(tl.int64)
        segment = (program % segments).to(tl.int64)

    totals = ()
    left_totals = ()
    for _ in tl.static_range(P):
        for _ in tl.static_range(GROUP):
            totals += (tl.zeros([LANES, VEC] if PER_CHANNEL else [LANES], dtype=tl.float32),)
        left_totals += (tl.zeros([LANES, VEC] if PER_CHANNEL else [LANES], dtype=tl.float32),)

    for step in range(steps):
        if PER_CHANNEL:
            token = span * steps + step
            offsets = token * length + inside
            valid = mask & (token < segments)
        else:
            inside = (span * steps + step) * BLOCK + element
            offsets = segment * length + inside
            valid = inside < length

        values = ()
        for j in tl.static_range(GROUP):
            row = history + (first + j) * row_stride
            values += (tl.load(row + offsets, mask=valid & (first + j < M), other=0.0).to(tl.float32),)
        new = ()
        new_left = ()
        for p in tl.static_range(P):
            factor = tl.load(left + p * row_size + offsets, mask=valid, other=0.0).to(tl.float32)
            for j in tl.static_range(GROUP):
                product = factor * values[j]
                new += (totals[p * GROUP + j] + (product if PER_CHANNEL else tl.sum(product, axis=1)),)
            new_left += (left_totals[p] + (factor if PER_CHANNEL else tl.sum(factor, axis=1)),)
        totals = new
        left_totals = new_left

    for p in tl.static_range(P):
        row = span * P + p
        for j in tl.static_range(GROUP):
            total = totals[p * GROUP + j]
            entry = row * M + first + j
            if PER_CHANNEL:
                tl.store(dots + entry * length + inside, total, mask=mask & (first + j < M))
            else:
                tl.store(dots + entry * segments + segment, tl.sum(total, axis=0), mask=first + j < M)
        if sums is not None:
            if PER_CHANNEL:
                tl.store(sums + row * length + inside, left_totals[p], mask=mask & (first == 0))
            else:
                tl.store(sums + row * segments + segment, tl.sum(left_totals[p], axis=0), mask=first == 0)
