# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
# mypy: ignore-errors
"""The Triton kernel of ``head``: one pass over the kept features, for all steps to be predicted."""

import triton
import triton.language as tl


@triton.jit
def operand(values, STORAGE: tl.constexpr):
    """float32 values as a tensor core takes them: in the storage dtype, or, for float16, in tf32.

    Values are not yet normalised when they enter the product, and float16 may not hold them: a feature of
    size 1e-5 would lose all its digits, one of 1e5 be infinite. tf32 has as many digits and float32's exponent. Tensor
    cores cut off what tf32 does not hold, so it is rounded here.
    """
    if STORAGE == tl.float16:
        bits = values.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return values.to(STORAGE)


@triton.jit(do_not_specialize=["samples", "tokens", "modulated"])
def head_kernel(
    out,  # [P, samples * tokens, outputs]
    history,  # [M, samples * tokens, channels], features row_stride apart
    means,  # float32 [M, samples * tokens]
    coefficients,  # float32 [P, M]
    multiplier,  # [P, modulated, channels]
    table,  # float32 [P, modulated, outputs]: addend @ weight.T + projection_bias
    weight,  # [outputs, channels]
    eps,
    row_stride_vec,
    channels_vec,
    samples,
    tokens,
    modulated,
    outputs,
    P: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUT_BLOCKS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    STORAGE: tl.constexpr = weight.dtype.element_ty
    groups: tl.constexpr = (P + GROUP - 1) // GROUP
    program = tl.program_id(0)
    first = (program % groups).to(tl.int64) * GROUP
    blocks = tl.cdiv(tokens, TOKENS)
    sample = (program // groups // blocks).to(tl.int64)
    begin = (program // groups % blocks) * TOKENS
    lane = tl.arange(0, TOKENS)
    inside = begin + lane < tokens
    row = sample * tokens + begin  # the first; what follows it is reached in 32 bits
    rows = samples.to(tl.int64) * tokens
    D = channels_vec * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC
    output = tl.arange(0, OUTPUTS)
    channel = tl.arange(0, CHANNELS)
    offsets = lane[:, None] * D + channel[None, :]

    centres = ()
    for j in tl.static_range(M):
        centres += (tl.load(means + j * rows + row + lane, mask=inside, other=0.0),)
    totals = ()
    squares = ()
    for _ in tl.static_range(GROUP):
        for _ in tl.static_range(OUTPUT_BLOCKS):
            totals += (tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32),)
        squares += (tl.zeros([TOKENS, CHANNELS // VEC], dtype=tl.float32),)

    for start in tl.range(0, D, CHANNELS, num_stages=STAGES):
        valid = start + channel < D
        features = ()
        for j in tl.static_range(M):
            first_element = history + j * row_stride + row * D + start
            h = tl.load(first_element + offsets, mask=inside[:, None] & valid[None, :], other=0.0)
            features += (h.to(tl.float32) - centres[j][:, None],)
        scaled = ()
        new_squares = ()
        for i in tl.static_range(GROUP):
            p = tl.minimum(first + i, P - 1)
            x = tl.load(coefficients + p * M) * features[0]
            for j in tl.static_range(1, M):
                x += tl.load(coefficients + p * M + j) * features[j]
            if RAGGED:
                x = tl.where(valid[None, :], x, 0.0)
            by_vector = tl.reshape(x * x, [TOKENS, CHANNELS // VEC, VEC])
            new_squares += (squares[i] + tl.sum(by_vector, axis=2),)
            scale = tl.load(multiplier + (p * modulated + sample % modulated) * D + start + channel, mask=valid, other=0.0)
            scaled += (operand(x * scale.to(tl.float32)[None, :], STORAGE),)
        squares = new_squares

        weights = ()
        for k in tl.static_range(OUTPUT_BLOCKS):
            o = k * OUTPUTS + output
            w = tl.load(weight + start + (o[:, None] * D + channel[None, :]), mask=(o < outputs)[:, None] & valid[None, :], other=0.0)
            weights += (tl.trans(w.to(tl.float32) if STORAGE == tl.float16 else w),)
        new_totals = ()
        for i in tl.static_range(GROUP):
            for k in tl.static_range(OUTPUT_BLOCKS):
                total = totals[i * OUTPUT_BLOCKS + k]
                new_totals += (tl.dot(scaled[i], weights[k], total, input_precision=PRECISION),)
        totals = new_totals

    for i in tl.static_range(GROUP):
        p = tl.minimum(first + i, P - 1)
        variance = tl.sum(squares[i], axis=1) / D
        factor = 1 / tl.sqrt(variance + eps)
        for k in tl.static_range(OUTPUT_BLOCKS):
            o = k * OUTPUTS + output
            shift = tl.load(table + (p * modulated + sample % modulated) * outputs + o, mask=o < outputs, other=0.0)
            y = totals[i * OUTPUT_BLOCKS + k] * factor[:, None] + shift[None, :]
            pointers = out + (p * rows + row) * outputs + (lane[:, None] * outputs + o[None, :])
            tl.store(pointers, y.to(out.dtype.element_ty), mask=inside[:, None] & (o < outputs)[None, :])
