"""Tile sizes of the KAN kernels, chosen without Triton: by dtype, and by the GPU they were measured on.

Sizes are fixed, without tuning at run time: the first call costs one compilation, and results are reproducible. Those
of ``GENERAL`` follow from the compiler's reports for sm_80, sm_90 and sm_100 (registers, shared memory) and from
arithmetic; compiled for sm_80 they fit into the 99 KB of shared memory that smaller GPUs have. Those of ``HOPPER``
were measured on an H200. Elsewhere they spill, or take more shared memory than there is.

Tables are by the bytes of an element. ``PRECISION`` is of float32 products: ``"ieee"``, as they are, or ``"tf32x3"``.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]

# One row: 128 programs for 256 outputs. More rows: every weight is used for four of them.
ONE_ROW: Config = {"BM": 1, "BN": 2, "BF": 1024, "num_warps": 4, "num_stages": 2}
FEW_ROWS: Config = {"BM": 4, "BN": 4, "BF": 512, "num_warps": 4, "num_stages": 2}


@dataclass(frozen=True)
class Tiles:
    """The sizes for one kind of GPU.

    Attributes:
        wide: of the forward pass, where there are more outputs than half of a tile's; None: as ``large``.
        large, medium: of the forward pass. If there are fewer large tiles than multiprocessors, medium ones use more.
        odd: without 16-byte accesses, where every element has its own 64-bit address and large tiles would spill.
        input_gradient, odd_input_gradient, weight_gradient, odd_weight_gradient: of the backward pass.
    """

    wide: dict[int, Config | None]
    large: dict[int, Config]
    medium: dict[int, Config]
    odd: dict[int, Config]
    input_gradient: dict[int, Config]
    odd_input_gradient: dict[int, Config]
    weight_gradient: dict[int, Config]
    odd_weight_gradient: dict[int, Config]


# Computing a basis takes about 10 instructions on 128 lanes of an SM; its use takes 2 BN operations on tensor cores,
# which do some 4,000 a cycle. The two balance at BN = 160, so with BN = 128 the tensor cores are almost always busy.
_LARGE = {
    2: {"BM": 128, "BN": 128, "BF": 64, "num_warps": 8, "num_stages": 3, "PRECISION": "ieee"},
    4: {"BM": 64, "BN": 64, "BF": 16, "num_warps": 4, "num_stages": 3, "PRECISION": "ieee"},
}
_INPUT_GRADIENT = {
    2: {"BM": 128, "BF": 128, "BK": 64, "num_warps": 8, "num_stages": 3, "PRECISION": "ieee"},
    4: {"BM": 64, "BF": 64, "BK": 16, "num_warps": 8, "num_stages": 2, "PRECISION": "ieee"},
}
_WEIGHT_GRADIENT = {
    2: {"BN": 128, "BF": 128, "BK": 32, "num_warps": 8, "num_stages": 3, "PRECISION": "ieee"},
    4: {"BN": 64, "BF": 64, "BK": 16, "num_warps": 8, "num_stages": 2, "PRECISION": "ieee"},
}
GENERAL = Tiles(
    wide={2: None, 4: None},
    large=_LARGE,
    medium={
        2: {"BM": 64, "BN": 64, "BF": 64, "num_warps": 4, "num_stages": 3, "PRECISION": "ieee"},
        4: _LARGE[4],
    },
    odd={
        2: {"BM": 128, "BN": 64, "BF": 32, "num_warps": 8, "num_stages": 3, "PRECISION": "ieee"},
        4: {"BM": 64, "BN": 32, "BF": 16, "num_warps": 4, "num_stages": 3, "PRECISION": "ieee"},
    },
    input_gradient=_INPUT_GRADIENT,
    odd_input_gradient={
        2: {"BM": 64, "BF": 128, "BK": 32, "num_warps": 8, "num_stages": 3, "PRECISION": "ieee"},
        4: _INPUT_GRADIENT[4],
    },
    weight_gradient=_WEIGHT_GRADIENT,
    odd_weight_gradient=_WEIGHT_GRADIENT,
)
# For [65536, 256] to 256, on an H200. bf16: all 256 outputs in a program, so that no basis is computed twice, 228 us
# for 359 us; two programs of the input gradient on a multiprocessor, 301 us for 369 us. float32: three products in
# tf32, 1.1 ms for 6.1 ms, with an error of 2.5e-7 for 8.1e-7. Weight gradients in float32 stay as they are: sums of a
# few rows are as exact as PyTorch's, and the tiles with which products in tf32 were faster, by 13 %, spill.
HOPPER = replace(
    GENERAL,
    wide={2: {"BM": 128, "BN": 256, "BF": 64, "num_warps": 8, "num_stages": 4, "PRECISION": "ieee"}, 4: None},
    large={
        2: _LARGE[2],
        4: {"BM": 128, "BN": 128, "BF": 32, "num_warps": 8, "num_stages": 3, "PRECISION": "tf32x3"},
    },
    medium={
        2: GENERAL.medium[2],
        4: {"BM": 64, "BN": 64, "BF": 32, "num_warps": 4, "num_stages": 3, "PRECISION": "tf32x3"},
    },
    odd={
        2: GENERAL.odd[2],
        4: {"BM": 64, "BN": 64, "BF": 32, "num_warps": 4, "num_stages": 2, "PRECISION": "tf32x3"},
    },
    input_gradient={
        2: _INPUT_GRADIENT[2] | {"maxnreg": 128},
        4: {"BM": 128, "BF": 64, "BK": 32, "num_warps": 8, "num_stages": 2, "PRECISION": "tf32x3"},
    },
    odd_input_gradient={
        2: GENERAL.odd_input_gradient[2],
        4: {"BM": 64, "BF": 64, "BK": 16, "num_warps": 8, "num_stages": 2, "PRECISION": "tf32x3"},
    },
    weight_gradient={
        2: {"BN": 128, "BF": 128, "BK": 64, "num_warps": 4, "num_stages": 3, "PRECISION": "ieee"},
        4: _WEIGHT_GRADIENT[4],
    },
)


def tiles_of(x: Tensor) -> Tiles:
    """The sizes for the GPU of a tensor."""
    return HOPPER if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 else GENERAL
