# mypy: ignore-errors
# (functions of Triton have no Python types)
# ruff: noqa: N803, N806 (compile-time constants are written in capitals)
"""Triton kernels of the KAN layer. They read x and the weights and write the result; bases are never stored.

The layer is one matrix product with the matrix of all bases. Number the pairs (input i, basis g) by
``f = i C + g``, which is how ``spline_weight`` [out, in, C] is in memory, and write ``Phi[b, f] = B_g(x[b, i])``:

    y  = silu(x) @ base_weight.T + Phi @ spline_weight.T          forward_kernel, forward_small_kernel
    dx = silu'(x) * (dy @ base_weight) + sum_g Phi' * (dy @ spline_weight)       input_gradient_kernel
    d base_weight = dy.T @ silu(x),  d spline_weight = dy.T @ Phi                weight_gradient_kernel

Every kernel computes the bases of a tile of x in registers, G = 8 at a time: all bases of the usual cubic on 5
intervals, and 16 bytes of bf16 weights for each input.

The bases are those of ``splines.py``. Arithmetic is in float32. Products of bf16 and fp16 tiles run on tensor cores
with float32 sums; for those the bases are rounded to the dtype of the weights, as F.linear on stored bases would.
float32 tiles are multiplied as float32 ("ieee"), PyTorch's own default for float32 matrices, or on Hopper, for y and
dx, on tensor cores ("tf32x3"): each operand is the sum of two numbers in tf32. These three products keep 21 bits, and
the error is that of PyTorch's own product or less; a single one keeps 10 bits.
"""

import triton
import triton.language as tl

from .splines import bases_of, silu


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
    PRECISION: tl.constexpr,
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
        y = tl.dot(silu(x.to(tl.float32)).to(w.dtype), w, y, input_precision=PRECISION)

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
            phi = bases_of(x.to(tl.float32), low, per_interval, first, ORDER, G)  # [BM, BF]
            y = tl.dot(phi.to(w.dtype), w, y, input_precision=PRECISION)

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
    """The same for few rows, without tensor cores: small tiles, so that there are enough programs for the GPU.

    A program makes a tile [BM, BN] of y, BM and BN from 1 to 4, from whole rows of weights. The BF partial sums of
    every element stay in registers and are added once, at the end, in a fixed order.
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
        y += silu(x.to(tl.float32))[:, None, :] * w.to(tl.float32)[None, :, :]

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
            phi = bases_of(x.to(tl.float32), low, per_interval, first, ORDER, G)  # [BM, BF]
            y += phi[:, None, :] * w.to(tl.float32)[None, :, :]

    total = tl.sum(y, axis=2)  # [BM, BN]
    where = y_ptr + b[:, None] * out_features + o[None, :]
    tl.store(where, total.to(y_ptr.dtype.element_ty), mask=in_rows & (o < out_features)[None, :])
