"""Launches of the KAN kernels. It imports Triton, so ``op.py`` imports it at the first launch."""

import torch
import triton
from torch import Tensor

from ...launching import on_device
from . import gradient_kernels, kernels
from .tiles import FEW_ROWS, GENERAL, ONE_ROW, Config, Tiles, tiles_of

NUM_SMS = 132  # of an H100 or H200
# The small kernel uses a basis for 4 outputs, about 4 instructions for a product: 132 SMs of 128 lanes at 1.7 GHz do
# 7e12 products a second. A medium tile should take about 0.4 us for 64 products along the contraction. Both times are
# proportional to in * (C + 1), and equal at rows * out = 45,000.
SMALL_OUTPUTS = 2**16

# Two programs on an SM hide each other's loads. With fewer rows in a split, writing its result takes most of the time.
WEIGHT_GRADIENT_PROGRAMS = 2 * NUM_SMS
ROWS_PER_SPLIT = 512
SUM_BLOCK = 1024

BASES = 8  # bases expanded together


def forward_config(
    rows: int, out_features: int, itemsize: int, wide: bool = True, tiles: Tiles = GENERAL
) -> tuple[bool, Config]:
    """Whether to use ``forward_small_kernel``, and the tile sizes; ``wide``: see ``has_wide_rows``."""
    if rows * out_features <= SMALL_OUTPUTS:
        return True, ONE_ROW if rows == 1 else FEW_ROWS
    if not wide:
        return False, tiles.odd[itemsize]

    def fills_gpu(config: Config) -> bool:
        return bool(triton.cdiv(rows, config["BM"]) * triton.cdiv(out_features, config["BN"]) >= NUM_SMS)

    widest, large = tiles.wide[itemsize], tiles.large[itemsize]
    if widest is not None and out_features > widest["BN"] // 2 and fills_gpu(widest):
        return False, widest
    return False, large if fills_gpu(large) else tiles.medium[itemsize]


def has_wide_rows(bases: int, *sizes: int) -> bool:
    """Whether Triton can use 16-byte accesses, for which sizes have to be multiples of 16."""
    return bases % BASES == 0 and all(size % 16 == 0 for size in sizes)


def forward(
    x: Tensor, base_weight: Tensor, spline_weight: Tensor, order: int, grid_range: tuple[float, float]
) -> Tensor:
    """x [..., in], base_weight [out, in], spline_weight [out, in, C] -> [..., out]."""
    out_features, in_features, bases = spline_weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    x = _as_rows(x)
    if y.numel() == 0:
        return y
    wide = has_wide_rows(bases, in_features, x.stride(0))
    small, config = forward_config(len(x), out_features, x.itemsize, wide, tiles_of(x))
    kernel = kernels.forward_small_kernel if small else kernels.forward_kernel
    programs = triton.cdiv(len(x), config["BM"]) * triton.cdiv(out_features, config["BN"])
    with on_device(x):
        kernel[(programs,)](
            x,
            base_weight.contiguous(),
            spline_weight.contiguous(),
            y,
            len(x),
            in_features,
            out_features,
            x.stride(0),
            *_scale(bases, order, grid_range),
            ORDER=order,
            C=bases,
            G=BASES,
            **config,
        )
    return y


def input_gradient(
    dy: Tensor, x: Tensor, base_weight: Tensor, spline_weight: Tensor, order: int, grid_range: tuple[float, float]
) -> Tensor:
    """dy [..., out], x [..., in] -> dx [..., in]."""
    out_features, in_features, bases = spline_weight.shape
    dx = x.new_empty(x.shape)
    dy, x = _as_rows(dy), _as_rows(x)
    if dx.numel() == 0:
        return dx
    wide = has_wide_rows(bases, in_features, out_features, dy.stride(0))
    tiles = tiles_of(x) if order == 3 else GENERAL  # other orders would spill with fewer registers
    config = (tiles.input_gradient if wide else tiles.odd_input_gradient)[x.itemsize]
    programs = triton.cdiv(len(x), config["BM"]) * triton.cdiv(in_features * BASES, config["BF"])
    with on_device(x):
        gradient_kernels.input_gradient_kernel[(programs,)](
            dy,
            x,
            base_weight.contiguous(),
            spline_weight.contiguous(),
            dx,
            len(x),
            in_features,
            out_features,
            dy.stride(0),
            x.stride(0),
            *_scale(bases, order, grid_range),
            ORDER=order,
            C=bases,
            G=BASES,
            **config,
        )
    return dx


def weight_gradients(
    dy: Tensor, x: Tensor, bases: int, order: int, grid_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """dy [..., out], x [..., in] -> gradients of the base weights [out, in] and the spline weights [out, in, bases]."""
    dy, x = _as_rows(dy), _as_rows(x)
    scale = _scale(bases, order, grid_range)
    base = _weight_gradient(dy, x, scale, SPLINE=False, ORDER=0, C=1, G=1).squeeze(-1)
    return base, _weight_gradient(dy, x, scale, SPLINE=True, ORDER=order, C=bases, G=BASES)


def _weight_gradient(dy: Tensor, x: Tensor, scale: tuple[float, float], **constants: int) -> Tensor:
    rows, in_features, out_features = len(x), x.shape[1], dy.shape[1]
    total = x.new_empty(out_features, in_features, constants["C"])
    if rows == 0 or total.numel() == 0:
        return total.zero_()
    # for the one basis of the base weights, a ninth of the work, the larger tiles would spill
    wide = constants["SPLINE"] and has_wide_rows(constants["C"], in_features, out_features, dy.stride(0))
    tiles_of_gpu = tiles_of(x)
    config = (tiles_of_gpu.weight_gradient if wide else tiles_of_gpu.odd_weight_gradient)[x.itemsize]
    inputs = config["BF"] // constants["G"]
    chunks = triton.cdiv(constants["C"], constants["G"])
    tiles = triton.cdiv(out_features, config["BN"]) * triton.cdiv(in_features, inputs) * chunks
    splits = max(1, min(WEIGHT_GRADIENT_PROGRAMS // tiles, rows // ROWS_PER_SPLIT))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), config["BK"]) * config["BK"]
    splits = triton.cdiv(rows, rows_per_split)
    partial = total if splits == 1 else torch.empty(splits, *total.shape, dtype=torch.float32, device=x.device)
    with on_device(x):
        gradient_kernels.weight_gradient_kernel[(tiles, splits)](
            dy,
            x,
            partial,
            rows,
            rows_per_split,
            in_features,
            out_features,
            dy.stride(0),
            x.stride(0),
            *scale,
            **constants,
            **config,
        )
        if splits > 1:
            blocks = triton.cdiv(total.numel(), SUM_BLOCK)
            gradient_kernels.sum_splits_kernel[(blocks,)](partial, total, splits, total.numel(), BLOCK=SUM_BLOCK)
    return total


def _as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n] with contiguous rows, at any distance from each other."""
    x = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def _scale(bases: int, order: int, grid_range: tuple[float, float]) -> tuple[float, float]:
    low, high = grid_range
    return float(low), (bases - order) / (high - low)
