# mypy: ignore-errors
# (functions of Triton have no Python types)
# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
"""Triton kernels of the gradients of the KAN layer; the equations and the numbering of bases are in ``kernels.py``."""

import triton
import triton.language as tl

from .splines import bases_of, basis_slope, distances, silu


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
    PRECISION: tl.constexpr,
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
            through_base = tl.dot(dy, base, through_base, input_precision=PRECISION)
            along = tl.dot(dy, spline, along, input_precision=PRECISION)
        slope = basis_slope(distances(x, low, per_interval, first, ORDER, G), ORDER)  # [BM, BI, G]
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
    PRECISION: tl.constexpr,
):
    """dw[s] = dy.T @ Phi over the rows of split s: a tile [BN, BF] a program, its bases computed again.

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
        phi = bases_of(x, low, per_interval, first, ORDER, G) if SPLINE else silu(x)  # [BK, BF]
        dw = tl.dot(tl.trans(dy), phi.to(dy.dtype), dw, input_precision=PRECISION)

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
