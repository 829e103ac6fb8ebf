"""Kernels for predicting transformer features: tensors in, tensors out.

This package knows nothing of diffusion, policies or files and depends on torch alone; other projects can use it
without ``lesa``. Every function has a plain PyTorch reference that runs anywhere and defines what is right.
"""

import warnings
from typing import Any

from .ops.combine.op import combine
from .ops.fused_output_head.op import fused_output_head, token_means
from .ops.gram_row.op import gram_row
from .ops.kan_linear.modules import KAN, KANLinear
from .ops.kan_linear.op import bspline_basis, kan_linear
from .ops.kan_predict.op import kan_predict
from .ops.prediction_error.op import prediction_error

__all__ = [
    "KAN",
    "KANLinear",
    "bspline_basis",
    "combine",
    "fused_output_head",
    "gram_row",
    "kan_linear",
    "kan_predict",
    "prediction_error",
    "token_means",
]

RENAMED = {"head": fused_output_head, "residual": prediction_error}  # names of version 0.1, until version 0.3


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = RENAMED[name]
    warnings.warn(f"lesa_kernels.{name} is now called {new.__name__}", DeprecationWarning, stacklevel=2)
    return new
