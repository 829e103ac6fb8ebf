# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
"""Triton kernels of the KAN layer. Nothing but x and the weights is ever read, nothing but results is written.

The layer is one matrix product with a matrix that is never stored. Number the pairs (input i, basis g) by
``f = i C + g``, which is how ``spline_weight`` [out, in, C] lies in memory, and write ``Phi[b, f] = B_g(x[b, i])``:

    y  = silu(x) @ base_weight.T + Phi @ spline_weight.T          forward_kernel, forward_small_kernel
    dx = silu'(x) * (dy @ base_weight) + sum_g Phi' * (dy @ spline_weight)       input_gradient_kernel
    d base_weight = dy.T @ silu(x),  d spline_weight = dy.T @ Phi                weight_gradient_kernel

Every kernel expands the bases of a tile of x in registers, G = 8 bases at a time: 8 for the usual cubic on 5
intervals, and 16 bytes of bf16 weights for each input whatever the grid. Weights are read where they are.

With h the width of an interval, ``(x - low) / h`` measures x in intervals and the bases of order k are shifts of one
even function of the distance to their middle, ``g + (1 - k) / 2``. As differences of truncated powers (Schoenberg,
"Cardinal Spline Interpolation", lecture 2), with ``r_c = max(c - |e|, 0)``:

    order 1:  r_1          order 2:  (r_1.5^2 - 3 r_0.5^2) / 2          order 3:  (r_2^3 - 4 r_1^3) / 6

The first power is at least twice the second, so the difference loses no accuracy. Outside their support all are 0.

Arithmetic is in float32. Products of bf16 and fp16 tiles run on tensor cores with float32 sums; for those the bases
are rounded to the dtype of the weights, as F.linear on stored bases would. float32 tiles are multiplied as float32
("ieee"), PyTorch's own default for float32 matrices, not as TF32, which keeps 10 bits.
"""

import triton
import triton.language as tl


@triton.jit
def _ramp(c, distance):
    return tl.maximum(c - distance, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _basis(e, ORDER: tl.constexpr):
    """The basis at the signed distance ``e`` (in intervals) from its middle."""
    d = tl.abs(e)
    if ORDER == 1:
        return _ramp(1.0, d)
    elif ORDER == 2:
        outer = _ramp(1.5, d)
        inner = _ramp(0.5, d)
        return 0.5 * (outer * outer - 3.0 * inner * inner)
    else:
        outer = _ramp(2.0, d)
        inner = _ramp(1.0, d)
        return (1 / 6) * (outer * outer * outer - 4.0 * inner * inner * inner)


@triton.jit
def _basis_slope(e, ORDER: tl.constexpr):
    """Derivative of ``_basis`` by ``e``; for order 1 the one to the right of a knot, as the reference has it."""
    d = tl.abs(e)
    if ORDER == 1:
        rising = tl.where((e >= -1.0) & (e < 0.0), 1.0, 0.0)
        falling = tl.where((e >= 0.0) & (e < 1.0), 1.0, 0.0)
        return rising - falling
    elif ORDER == 2:
        slope = _ramp(1.5, d) - 3.0 * _ramp(0.5, d)
        return tl.where(e > 0.0, -slope, slope)
    else:
        outer = _ramp(2.0, d)
        inner = _ramp(1.0, d)
        slope = 0.5 * (outer * outer - 4.0 * inner * inner)
        return tl.where(e > 0.0, -slope, slope)


@triton.jit
def _distances(x, low, per_interval, first, ORDER: tl.constexpr, G: tl.constexpr):
    """Signed distances of x [M, BI] from the middles of the bases first .. first + G - 1: [M, BI, G]."""
    middle = tl.arange(0, G) + (first + 0.5 * (1 - ORDER))
    return ((x - low) * per_interval)[:, :, None] - middle[None, None, :]


@triton.jit
def _bases(x, low, per_interval, first, ORDER: tl.constexpr, G: tl.constexpr):
    """Phi of x [M, BI] for the bases first .. first + G - 1: [M, BI * G]."""
    bases = _basis(_distances(x, low, per_interval, first, ORDER, G), ORDER)
    return tl.reshape(bases, [x.shape[0], x.shape[1] * G])


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    base_ptr,
    spline_ptr,
    y_ptr,
    rows,
    in_features,
    out_features,
    x_stride,
    low,
    per_interval,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    G: tl.constexpr,
):
    """y = silu(x) @ base.T + Phi @ spline.T, a tile [BM, BN] a program.

    x [rows, in] with rows ``x_stride`` apart, base [out, in], spline [out, in, C], y [rows, out]. Programs that share
    rows of x are neighbours, so x comes from memory once and from L2 afterwards.
    """
    BI: tl.constexpr = BF // G
    tiles_out = tl.cdiv(out_features, BN)
    b = (tl.program_id(0) // tiles_out).to(tl.int64) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) % tiles_out).to(tl.int64) * BN + tl.arange(0, BN)
    in_rows = (b < rows)[:, None]
    in_outputs = (o < out_features)[None, :]
    f = tl.arange(0, BF)
    y = tl.zeros([BM, BN], dtype=tl.float32)

    for start in range(0, in_features, BF):
        i = start + f
        inside = i < in_features
        x = tl.load(x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & inside[None, :], other=0.0)  # [BM, BF]
        w = tl.load(
            base_ptr + o[None, :] * in_features + i[:, None], mask=inside[:, None] & in_outputs, other=0.0
        )  # [BF, BN]
        y = tl.dot(_silu(x.to(tl.float32)).to(w.dtype), w, y, input_precision="ieee")

    for start in range(0, in_features, BI):
        i = start + tl.arange(0, BI)
        x = tl.load(
            x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & (i < in_features)[None, :], other=0.0
        )  # [BM, BI]
        for first in range(0, C, G):
            input_f = start + f // G
            basis_f = first + f % G
            inside = (input_f < in_features) & (basis_f < C)
            w = tl.load(
                spline_ptr + o[None, :] * (in_features * C) + (input_f * C + basis_f)[:, None],
                mask=inside[:, None] & in_outputs,
                other=0.0,
            )  # [BF, BN]
            phi = _bases(x.to(tl.float32), low, per_interval, first, ORDER, G)  # [BM, BF]
            y = tl.dot(phi.to(w.dtype), w, y, input_precision="ieee")

    tl.store(y_ptr + b[:, None] * out_features + o[None, :], y.to(y_ptr.dtype.element_ty), mask=in_rows & in_outputs)


@triton.jit(do_not_specialize=["rows"])
def forward_small_kernel(
    x_ptr,
    base_ptr,
    spline_ptr,
    y_ptr,
    rows,
    in_features,
    out_features,
    x_stride,
    low,
    per_interval,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    G: tl.constexpr,
):
    """The same for few rows: products on the ordinary cores, and so few outputs a program that all of the GPU works.

    A program makes a tile [BM, BN] of y, BM and BN from 1 to 4, out of whole rows of weights, which it reads as they
    lie. The BF partial sums of every element stay in registers and are added up once, at the end, in a fixed order.
    Arguments as in ``forward_kernel``.
    """
    BI: tl.constexpr = BF // G
    tiles_out = tl.cdiv(out_features, BN)
    b = (tl.program_id(0) // tiles_out).to(tl.int64) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) % tiles_out).to(tl.int64) * BN + tl.arange(0, BN)
    in_rows = (b < rows)[:, None]
    in_outputs = (o < out_features)[:, None]
    f = tl.arange(0, BF)
    y = tl.zeros([BM, BN, BF], dtype=tl.float32)

    for start in range(0, in_features, BF):
        i = start + f
        inside = (i < in_features)[None, :]
        x = tl.load(x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & inside, other=0.0)  # [BM, BF]
        w = tl.load(base_ptr + o[:, None] * in_features + i[None, :], mask=in_outputs & inside, other=0.0)  # [BN, BF]
        y += _silu(x.to(tl.float32))[:, None, :] * w.to(tl.float32)[None, :, :]

    for start in range(0, in_features, BI):
        i = start + tl.arange(0, BI)
        x = tl.load(
            x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & (i < in_features)[None, :], other=0.0
        )  # [BM, BI]
        for first in range(0, C, G):
            input_f = start + f // G
            basis_f = first + f % G
            inside = (input_f < in_features) & (basis_f < C)
            w = tl.load(
                spline_ptr + o[:, None] * (in_features * C) + (input_f * C + basis_f)[None, :],
                mask=in_outputs & inside[None, :],
                other=0.0,
            )  # [BN, BF]
            phi = _bases(x.to(tl.float32), low, per_interval, first, ORDER, G)  # [BM, BF]
            y += phi[:, None, :] * w.to(tl.float32)[None, :, :]

    total = tl.sum(y, axis=2)  # [BM, BN]
    where = y_ptr + b[:, None] * out_features + o[None, :]
    tl.store(where, total.to(y_ptr.dtype.element_ty), mask=in_rows & (o < out_features)[None, :])


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    dy_ptr,
    x_ptr,
    base_ptr,
    spline_ptr,
    dx_ptr,
    rows,
    in_features,
    out_features,
    dy_stride,
    x_stride,
    low,
    per_interval,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
):
    """dx = silu'(x) * (dy @ base) + sum_g Phi' * (dy @ spline), a tile [BM, BF / G] a program.

    dy [rows, out], x [rows, in], base [out, in], spline [out, in, C], dx [rows, in]. ``dy @ spline`` is a tile
    [BM, BF] of float32 sums over all outputs, BK at a time; slopes are applied to it in registers.
    """
    BI: tl.constexpr = BF // G
    tiles_in = tl.cdiv(in_features, BI)
    b = (tl.program_id(0) // tiles_in).to(tl.int64) * BM + tl.arange(0, BM)
    in_start = (tl.program_id(0) % tiles_in) * BI
    i = in_start + tl.arange(0, BI)
    f = tl.arange(0, BF)
    in_rows = (b < rows)[:, None]
    in_inputs = (i < in_features)[None, :]

    x = tl.load(x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & in_inputs, other=0.0).to(tl.float32)
    through_base = tl.zeros([BM, BI], dtype=tl.float32)
    through_spline = tl.zeros([BM, BI], dtype=tl.float32)
    for first in range(0, C, G):
        input_f = in_start + f // G
        basis_f = first + f % G
        inside = ((input_f < in_features) & (basis_f < C))[None, :]
        along = tl.zeros([BM, BF], dtype=tl.float32)
        for start in range(0, out_features, BK):
            o = (start + tl.arange(0, BK)).to(tl.int64)
            in_outputs = o < out_features
            dy = tl.load(
                dy_ptr + b[:, None] * dy_stride + o[None, :], mask=in_rows & in_outputs[None, :], other=0.0
            )  # [BM, BK]
            # The base weights ride along with the first bases, whose dy they share; later they are zeros, not loads.
            base = tl.load(
                base_ptr + o[:, None] * in_features + i[None, :],
                mask=in_outputs[:, None] & in_inputs & (first == 0),
                other=0.0,
            )  # [BK, BI]
            spline = tl.load(
                spline_ptr + o[:, None] * (in_features * C) + (input_f * C + basis_f)[None, :],
                mask=in_outputs[:, None] & inside,
                other=0.0,
            )  # [BK, BF]
            through_base = tl.dot(dy, base, through_base, input_precision="ieee")
            along = tl.dot(dy, spline, along, input_precision="ieee")
        slope = _basis_slope(_distances(x, low, per_interval, first, ORDER, G), ORDER)  # [BM, BI, G]
        through_spline += tl.sum(tl.reshape(along, [BM, BI, G]) * slope, axis=2)

    s = tl.sigmoid(x)
    dx = through_base * s * (1.0 + x * (1.0 - s)) + through_spline * per_interval
    tl.store(dx_ptr + b[:, None] * in_features + i[None, :], dx.to(dx_ptr.dtype.element_ty), mask=in_rows & in_inputs)


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    rows,
    rows_per_split,
    in_features,
    out_features,
    dy_stride,
    x_stride,
    low,
    per_interval,
    SPLINE: tl.constexpr,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
):
    """dw[s] = dy.T @ Phi over the rows of split s: a tile [BN, BF] a program, its bases expanded anew.

    dy [rows, out], x [rows, in], dw [splits, out, in, C]. With SPLINE false (then C = G = 1) the one basis is silu, and
    dw is the gradient of the base weights. Each program writes a place of its own, so there are no atomics and the
    result does not depend on which program ends first.
    """
    BI: tl.constexpr = BF // G
    chunks: tl.constexpr = (C + G - 1) // G
    tiles_out = tl.cdiv(out_features, BN)
    tile = tl.program_id(0)
    o = (tile % tiles_out).to(tl.int64) * BN + tl.arange(0, BN)
    in_start = (tile // tiles_out) // chunks * BI
    first = (tile // tiles_out) % chunks * G
    split = tl.program_id(1).to(tl.int64)
    i = in_start + tl.arange(0, BI)
    in_inputs = (i < in_features)[None, :]
    in_outputs = o < out_features
    end = tl.minimum(rows, (split + 1) * rows_per_split)

    dw = tl.zeros([BN, BF], dtype=tl.float32)
    for start in range(split * rows_per_split, end, BK):
        b = start + tl.arange(0, BK)
        in_rows = (b < end)[:, None]
        dy = tl.load(
            dy_ptr + b[:, None] * dy_stride + o[None, :], mask=in_rows & in_outputs[None, :], other=0.0
        )  # [BK, BN]
        x = tl.load(x_ptr + b[:, None] * x_stride + i[None, :], mask=in_rows & in_inputs, other=0.0)  # [BK, BI]
        x = x.to(tl.float32)
        phi = _bases(x, low, per_interval, first, ORDER, G) if SPLINE else _silu(x)  # [BK, BF]
        dw = tl.dot(tl.trans(dy), phi.to(dy.dtype), dw, input_precision="ieee")

    f = tl.arange(0, BF)
    input_f = in_start + f // G
    basis_f = first + f % G
    where = dw_ptr + (split * out_features + o)[:, None] * (in_features * C) + (input_f * C + basis_f)[None, :]
    inside = (input_f < in_features) & (basis_f < C)
    tl.store(where, dw.to(dw_ptr.dtype.element_ty), mask=in_outputs[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(partial_ptr, total_ptr, splits, size, BLOCK: tl.constexpr):
    """total [size] = sum of partial [splits, size] over the splits, first to last."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    where = partial_ptr + j
    for _ in range(splits):
        total += tl.load(where, mask=inside, other=0.0)
        where += size
    tl.store(total_ptr + j, total.to(total_ptr.dtype.element_ty), mask=inside)
