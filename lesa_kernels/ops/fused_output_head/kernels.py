# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
# mypy: ignore-errors
# (functions of Triton have no Python types)
"""The Triton kernel of ``fused_output_head``: the outputs of all predicted steps in one pass over the kept features.

    x[p]   = sum_j c[p, j] * (history[j] - mean_j)           centred: the mean of a sum is the sum of the means
    out[p] = (x[p] * multiplier[p]) @ weight.T / sqrt(mean x[p]^2 + eps) + table[p]

The norm divides a token by one number, so the product with the weights can be computed first, in the same pass. A bias
that all channels share disappears with the mean. Means that were kept with the features are subtracted before anything
is squared, so no second pass is needed and no digits are lost.

For a weighted sum, SUMMED, a program stores the sum over its group of predictions, in float32 if there are more groups,
and ``launch.py`` adds up the groups.

Sizes are passed divided by VEC, the elements of 16 bytes: see the kernels of ``combine``.
"""

import triton
import triton.language as tl


@triton.jit
def operand(values, STORAGE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 values in the dtype of the product: the storage dtype, but tf32 in place of float16.

    They are not normalised yet and may exceed the range of float16. tf32 has as many digits and the range of float32. A
    tensor core truncates to tf32, so values are rounded here.
    """
    if PRECISION == "tf32":
        bits = values.to(tl.int32, bitcast=True)
        rounded = (tl.add(bits, 0x1000, sanitize_overflow=False) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(values == values, rounded, values)  # the sum may overflow a NaN to -0.0
    else:
        return values.to(STORAGE)


@triton.jit(do_not_specialize=["row_stride_vec", "samples", "tokens", "modulated", "predictions"])
def fused_output_head_kernel(
    out,  # [P, samples * tokens, outputs]; SUMMED: [groups, samples * tokens, outputs]
    history,  # [M, samples * tokens, channels], features row_stride apart
    means,  # float32 [M, samples * tokens]: of each token's channels
    coefficients,  # float32 [P, M]
    multiplier,  # [P, modulated, channels]; modulated is samples, or 1
    table,  # float32 [P, modulated, outputs]: addend @ weight.T + projection_bias; SUMMED: the sum over P
    weight,  # [outputs, channels]
    shares,  # float32 [predictions], their weights in the sum; None unless SUMMED
    eps,
    row_stride_vec,
    channels_vec,
    samples,
    tokens,
    modulated,
    outputs,
    predictions,
    P: tl.constexpr,  # None if SUMMED, or each number of substeps would be compiled anew
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
    SUMMED: tl.constexpr,
):
    """TOKENS tokens of one sample, GROUP predictions, all outputs; a loop over blocks of CHANNELS channels.

    If P is no multiple of GROUP, the last group computes the last prediction more than once, with the same bits. In a
    sum it counts once.
    """
    STORAGE: tl.constexpr = weight.dtype.element_ty
    count = predictions if SUMMED else P
    groups = (count + GROUP - 1) // GROUP
    program = tl.program_id(0)
    group = (program % groups).to(tl.int64)
    first = group * GROUP
    blocks = tl.cdiv(tokens, TOKENS)
    sample = (program // groups // blocks).to(tl.int64)
    begin = (program // groups % blocks) * TOKENS
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)
    inside = begin + token < tokens

    # 64 bits to the first token of the program, 32 from there
    rows = samples.to(tl.int64) * tokens
    row = sample * tokens + begin
    channels = channels_vec * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC
    offsets = token[:, None] * channels + channel[None, :]  # [TOKENS, CHANNELS]

    centres = ()
    for j in tl.static_range(M):
        centres += (tl.load(means + j * rows + row + token, mask=inside, other=0.0),)
    totals = ()
    squares = ()  # VEC neighbours in one sum, which stays in a thread; threads are added up after the loop
    for _ in tl.static_range(GROUP):
        squares += (tl.zeros([TOKENS, CHANNELS // VEC], dtype=tl.float32),)
        for _ in tl.static_range(OUTPUT_BLOCKS):
            totals += (tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32),)

    for start in tl.range(0, channels, CHANNELS, num_stages=STAGES):
        valid = start + channel < channels if RAGGED else tl.full([CHANNELS], True, tl.int1)
        features = ()
        for j in tl.static_range(M):
            block = history + j * row_stride + row * channels + start
            h = tl.load(block + offsets, mask=inside[:, None] & valid[None, :], other=0.0)
            features += (h.to(tl.float32) - centres[j][:, None],)  # [TOKENS, CHANNELS]

        # first all operands, then all products, so that the registers of the features are free
        operands = ()
        new_squares = ()
        for i in tl.static_range(GROUP):
            p = tl.minimum(first + i, count - 1)
            x = tl.load(coefficients + p * M) * features[0]
            for j in tl.static_range(1, M):
                x += tl.load(coefficients + p * M + j) * features[j]
            if RAGGED:
                x = tl.where(valid[None, :], x, 0.0)
            by_vector = tl.reshape(x * x, [TOKENS, CHANNELS // VEC, VEC])
            new_squares += (squares[i] + tl.sum(by_vector, axis=2),)
            scales = multiplier + (p * modulated + sample % modulated) * channels + start
            scale = tl.load(scales + channel, mask=valid, other=0.0).to(tl.float32)
            operands += (operand(x * scale[None, :], STORAGE, PRECISION),)
        squares = new_squares

        weights = ()
        for k in tl.static_range(OUTPUT_BLOCKS):
            o = k * OUTPUTS + output
            known = (o < outputs)[:, None] & valid[None, :]
            w = tl.load(weight + start + (o[:, None] * channels + channel[None, :]), mask=known, other=0.0)
            weights += (tl.trans(w.to(tl.float32) if PRECISION == "tf32" else w),)  # [CHANNELS, OUTPUTS]
        new_totals = ()
        for i in tl.static_range(GROUP):
            for k in tl.static_range(OUTPUT_BLOCKS):
                total = totals[i * OUTPUT_BLOCKS + k]
                new_totals += (tl.dot(operands[i], weights[k], total, input_precision=PRECISION),)
        totals = new_totals

    if SUMMED:
        factors = ()
        for i in tl.static_range(GROUP):
            share = tl.load(shares + tl.minimum(first + i, count - 1))
            factors += (share / tl.sqrt(tl.sum(squares[i], axis=1) / channels + eps),)  # [TOKENS]
        for k in tl.static_range(OUTPUT_BLOCKS):
            o = k * OUTPUTS + output
            known = o < outputs
            shift = tl.load(table + sample % modulated * outputs + o, mask=known & (group == 0), other=0.0)
            y = tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32) + shift[None, :]
            for i in tl.static_range(GROUP):
                part = totals[i * OUTPUT_BLOCKS + k] * factors[i][:, None]
                y += tl.where(first + i < count, part, 0.0)
            results = out + (group * rows + row) * outputs + (token[:, None] * outputs + o[None, :])
            tl.store(results, y.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])
    else:
        for i in tl.static_range(GROUP):
            p = tl.minimum(first + i, count - 1)
            factor = 1 / tl.sqrt(tl.sum(squares[i], axis=1) / channels + eps)  # [TOKENS]
            for k in tl.static_range(OUTPUT_BLOCKS):
                o = k * OUTPUTS + output
                shifts = table + (p * modulated + sample % modulated) * outputs
                shift = tl.load(shifts + o, mask=o < outputs, other=0.0)
                y = totals[i * OUTPUT_BLOCKS + k] * factor[:, None] + shift[None, :]
                results = out + (p * rows + row) * outputs + (token[:, None] * outputs + o[None, :])
                tl.store(results, y.to(out.dtype.element_ty), mask=inside[:, None] & (o < outputs)[None, :])
