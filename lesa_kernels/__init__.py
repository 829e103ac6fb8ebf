"""Kernels for predicting transformer features: tensors in, tensors out.

This package knows nothing of diffusion, policies or files and depends on torch alone; other projects can use it
without ``lesa``. Every function has a plain PyTorch reference that runs anywhere and defines what is right.
"""

from .combine.ops import combine
from .kan.modules import KAN, KANLinear
from .kan.ops import bspline_basis, kan_linear
from .kan_predict.ops import kan_predict

__all__ = ["KAN", "KANLinear", "bspline_basis", "combine", "kan_linear", "kan_predict"]
