"""Kernels for predicting transformer features: tensors in, tensors out.

This package knows nothing of diffusion, policies or files and depends on torch alone; other projects can use it
without ``lesa``. Every function has a plain PyTorch reference that runs anywhere and defines what is right.
"""

from .ops.combine.op import combine, combine_with_gram_row, gram_row
from .ops.head.op import head, token_means
from .ops.kan.modules import KAN, KANLinear
from .ops.kan.op import bspline_basis, kan_linear
from .ops.kan_predict.op import kan_predict
from .ops.residual.op import residual

__all__ = [
    "KAN",
    "KANLinear",
    "bspline_basis",
    "combine",
    "combine_with_gram_row",
    "gram_row",
    "head",
    "kan_linear",
    "kan_predict",
    "residual",
    "token_means",
]
