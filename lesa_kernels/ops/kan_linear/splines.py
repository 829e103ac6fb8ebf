# mypy: ignore-errors
# (functions of Triton have no Python types)
# ruff: noqa: N803 (compile-time constants are written in capitals)
"""B-spline bases of a uniform grid in Triton.

With h the width of an interval, ``(x - low) / h`` measures x in intervals, and the bases of order k are shifts of one
even function of the distance to their middle, ``g + (1 - k) / 2``. As differences of truncated powers (Schoenberg,
"Cardinal Spline Interpolation", lecture 2), with ``r_c = max(c - |e|, 0)``:

    order 1:  r_1          order 2:  (r_1.5^2 - 3 r_0.5^2) / 2          order 3:  (r_2^3 - 4 r_1^3) / 6

The first power is at least twice the second, so the difference loses no accuracy. Outside their support all are 0.
"""

import triton
import triton.language as tl


@triton.jit
def ramp(c, distance):
    """max(c - distance, 0); NaN stays NaN."""
    return tl.maximum(c - distance, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def basis(e, ORDER: tl.constexpr):
    """The basis at the signed distance ``e`` (in intervals) from its middle."""
    d = tl.abs(e)
    if ORDER == 1:
        return ramp(1.0, d)
    elif ORDER == 2:
        outer = ramp(1.5, d)
        inner = ramp(0.5, d)
        return 0.5 * (outer * outer - 3.0 * inner * inner)
    else:
        outer = ramp(2.0, d)
        inner = ramp(1.0, d)
        return (1 / 6) * (outer * outer * outer - 4.0 * inner * inner * inner)


@triton.jit
def basis_slope(e, ORDER: tl.constexpr):
    """Derivative of ``_basis`` by ``e``; for order 1 the one to the right of a knot, as the reference has it."""
    d = tl.abs(e)
    if ORDER == 1:
        rising = tl.where((e >= -1.0) & (e < 0.0), 1.0, 0.0)
        falling = tl.where((e >= 0.0) & (e < 1.0), 1.0, 0.0)
        return rising - falling
    elif ORDER == 2:
        slope = ramp(1.5, d) - 3.0 * ramp(0.5, d)
        return tl.where(e > 0.0, -slope, slope)
    else:
        outer = ramp(2.0, d)
        inner = ramp(1.0, d)
        slope = 0.5 * (outer * outer - 4.0 * inner * inner)
        return tl.where(e > 0.0, -slope, slope)


@triton.jit
def distances(x, low, per_interval, first, ORDER: tl.constexpr, G: tl.constexpr):
    """Signed distances of x [M, BI] from the middles of the bases first .. first + G - 1: [M, BI, G]."""
    middle = tl.arange(0, G) + (first + 0.5 * (1 - ORDER))
    return ((x - low) * per_interval)[:, :, None] - middle[None, None, :]


@triton.jit
def bases_of(x, low, per_interval, first, ORDER: tl.constexpr, G: tl.constexpr):
    """Phi of x [M, BI] for the bases first .. first + G - 1: [M, BI * G]."""
    bases = basis(distances(x, low, per_interval, first, ORDER, G), ORDER)
    return tl.reshape(bases, [x.shape[0], x.shape[1] * G])


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)
