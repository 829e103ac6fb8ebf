"""Kernels for predicting transformer features: tensors in, tensors out.

This package knows nothing of diffusion, policies or files and depends on torch alone; other projects can use it
without ``lesa``. Every function has a plain PyTorch reference that runs anywhere and defines what is right.
"""

from .combine.ops import combine, combine_with_gram_row, gram_row
from .head.ops import head, token_means
from .kan.modules import KAN, KANLinear
from .kan.ops import bspline_basis, kan_linear
from .kan_predict.ops import kan_predict
from .residual.ops import residual

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
