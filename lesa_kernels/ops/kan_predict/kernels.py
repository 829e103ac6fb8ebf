# mypy: ignore-errors
# (functions of Triton have no Python types)
# ruff: noqa: N803 (compile-time constants are written in capitals)
"""Triton kernels of ``kan_predict``: a tiny one that sums weights over experts, and one pass over the tokens.

Per element, a step adds to the last feature of its window of K (the experts' weights already summed; x = s h):

    bias_p + 1/s * sum_k (linear[p, k] x_k + base[p, k] silu(x_k) + sum_g spline[p, k, g] B_g(x_k))

One program takes a block of elements through all steps. It keeps no window: it walks along the sequence feature 0, ...,
feature K - 1, prediction 0, prediction 1, ... and adds what each member contributes to all steps in whose window it
stands, at once. So a feature is loaded once and its activations are evaluated once, not once for every step; what rolls
in registers are the sums of the min(K, P) steps whose windows are open.

Only the ORDER + 1 bases that are not zero at x are evaluated, and their weights are looked up by the interval in which
x lies: gathers from a table of a few kilobytes, which stays in L1.

Arithmetic intensity: a cubic input costs about 26 FLOP (scale 1, place on the grid 6, bases 15, SiLU 4, with exp and
division as one each), and for every step that it serves 12 more. In bf16 with K = 8 that is

    P = 1:  8 * 26 + 8 * 12 = 304 FLOP for 9 * 2 bytes,     17 FLOP per byte
    P = 6:  13 * 26 + 48 * 12 = 914 FLOP for 14 * 2 bytes,  33 FLOP per byte

while an H200 (67 TFLOP/s in float32, 4.8 TB/s) is balanced at 14, and at that only if it does nothing but fused
multiply-adds. With look-ups, conversions and comparisons the code for sm_90 has 50 instructions for an input of P = 1,
22 per byte, of which an H200 issues 7 in the time of a byte: arithmetic is the bound, not memory. The alternative, all
C bases times weights in scalar registers, needs no look-ups, but at C = 8 about 90 FLOP of bases for an input and 20
for a step.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["experts"])
def fold_kernel(
    table,
    gates,
    linear_weight,
    base_weight,
    spline_weight,
    bias,
    experts,
    K: tl.constexpr,
    C: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``sum_e gates[p, e] * weights[e]`` into table[p], one program a step.

    gates [P, experts]; linear_weight, base_weight [experts, K]; spline_weight [experts, K, C]; bias [experts];
    table float32 [P, K + 1, WIDTH], whose row k of a step is

        ORDER zeros | spline_weight[k], C of them | ORDER zeros | unused | base_weight[k] | linear_weight[k]

    and whose row K begins with the bias. Thanks to the zeros an interval at the edge of the grid is like any other.
    ROWS and WIDTH are powers of two, at least K + 1 and C + 2 ORDER + 2.
    """
    p = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    basis = column - ORDER
    is_spline = (row < K) & (basis >= 0) & (basis < C)  # [ROWS, WIDTH]
    is_base = (row < K) & (column == WIDTH - 2)
    is_linear = (row < K) & (column == WIDTH - 1)
    is_bias = (row == K) & (column == 0)
    zero = tl.zeros([ROWS, WIDTH], dtype=tl.int32)

    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for expert in range(experts):
        edge = expert * K + row  # [ROWS, 1]
        # no entry has more than one of these, so their sum is the one it has
        weights = tl.load(spline_weight + edge * C + basis, mask=is_spline, other=0.0).to(tl.float32)
        weights += tl.load(base_weight + edge + zero, mask=is_base, other=0.0).to(tl.float32)
        weights += tl.load(linear_weight + edge + zero, mask=is_linear, other=0.0).to(tl.float32)
        weights += tl.load(bias + expert + zero, mask=is_bias, other=0.0).to(tl.float32)
        total += tl.load(gates + p * experts + expert).to(tl.float32) * weights
    tl.store(table + (p * (K + 1) + row) * WIDTH + column, total, mask=row <= K)


@triton.jit
def _nonzero_bases(u, ORDER: tl.constexpr):
    """The ORDER + 1 B-splines that are not zero on an interval, from left to right, at the fraction u of it."""
    v = 1 - u
    if ORDER == 1:
        return (v, u)
    elif ORDER == 2:
        return (0.5 * v * v, tl.fma(u, v, 0.5), 0.5 * u * u)
    else:
        uu = u * u
        vv = v * v
        return (vv * v * (1 / 6), tl.fma(uu, 0.5 * u - 1, 2 / 3), tl.fma(vv, 0.5 * v - 1, 2 / 3), uu * u * (1 / 6))


@triton.jit
def _add_to_open_steps(
    sums,
    x,
    first,
    newest,
    table,
    knots_per_unit,
    knot_offset,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``sums`` with what x contributes to them: sums[i] is of step first + i, whose window has x at newest - i."""
    silu = x / (1 + tl.exp(-x))

    # The spline is zero outside the extended grid, so it is at both ends. NaN also has to find some weight: the first.
    position = tl.fma(x, knots_per_unit, knot_offset)
    position = tl.where(position > 0, position, 0.0)
    position = tl.minimum(position, C + ORDER)
    interval = tl.minimum(position.to(tl.int32), C + ORDER - 1)
    bases = _nonzero_bases(position - interval.to(tl.float32), ORDER)

    added = ()
    for i in tl.static_range(len(sums)):
        total = sums[i]
        if (first + i < P) & (newest - i >= 0):
            row = table + ((first + i) * (K + 1) + newest - i) * WIDTH
            total += tl.load(row + WIDTH - 1) * x
            total += tl.load(row + WIDTH - 2) * silu
            for b in tl.static_range(ORDER + 1):
                total = tl.fma(tl.load(row + interval + b), bases[b], total)
        added += (total,)
    return added


@triton.jit(do_not_specialize=["length_vec", "row_stride_vec", "channels_vec"])
def predict_kernel(
    history,
    table,
    scale,
    out,
    length_vec,
    row_stride_vec,
    channels_vec,
    knots_per_unit,
    knot_offset,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """P predictions for LANES * VEC elements. A lane holds VEC neighbours: the 16 bytes of one access.

    history: K rows of ``length`` elements, ``row_stride`` apart; table: float32 [P, K + 1, WIDTH] of ``fold_kernel``;
    scale: [channels], or None; out: [P, length]. ``x * knots_per_unit + knot_offset`` is x in intervals from the first
    knot of the extended grid. Length, stride and channels come divided by VEC: that, unlike divisibility by 8, Triton
    takes as proof that rows begin on 16 bytes. VEC = 1 serves what is not aligned. Offsets are 64-bit.
    """
    vector = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    within = tl.arange(0, VEC)[None, :]
    element = vector[:, None] * VEC + within  # [LANES, VEC], as is everything per element
    mask = (vector < length_vec)[:, None]
    length = length_vec.to(tl.int64) * VEC
    row_stride = row_stride_vec.to(tl.int64) * VEC

    s = 1.0
    if scale is not None:
        s = tl.load(scale + (vector % channels_vec)[:, None] * VEC + within).to(tl.float32)

    sums = ()
    for _ in tl.static_range(min(K, P)):
        sums += (tl.zeros([LANES, VEC], dtype=tl.float32),)

    arriving = tl.load(history + element, mask=mask, other=0.0)
    # Not the first feature: in float32 that is the same value as arriving, and Triton (3.6, 3.7) then takes h for a
    # constant of the loop, after which it would still be the first feature.
    h = tl.zeros([LANES, VEC], dtype=tl.float32)
    for k in range(K):
        h = arriving.to(tl.float32)
        # the next feature is on its way while this one is worked on
        arriving = tl.load(history + (k + 1) * row_stride + element, mask=mask & (k + 1 < K), other=0.0)
        sums = _add_to_open_steps(sums, h * s, 0, k, table, knots_per_unit, knot_offset, K, P, C, ORDER, WIDTH)

    for p in range(P):
        # h is the last of the window of step p, whose sum is complete; the prediction is the last of the next window
        h += sums[0] * (1 / s) + tl.load(table + (p * (K + 1) + K) * WIDTH)
        tl.store(out + p * length + element, h.to(out.dtype.element_ty), mask=mask)
        if p + 1 < P:
            rolled = sums[1:]
            rolled += (tl.zeros([LANES, VEC], dtype=tl.float32),)
            sums = _add_to_open_steps(
                rolled, h * s, p + 1, K - 1, table, knots_per_unit, knot_offset, K, P, C, ORDER, WIDTH
            )
