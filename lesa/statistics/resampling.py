"""Resampling: the Gram matrix of another schedule of the same model, since features are smooth functions of time."""

import torch
from torch import Tensor

from lesa.statistics.gram import GramMatrix
from lesa.statistics.interpolation import Stencil


def resample(gram: GramMatrix, times: Tensor, wanted: Tensor) -> GramMatrix:
    """Inner products of the features at other times, each a cubic interpolation of those at the nearest four.

    The sampler's path hardly depends on its steps, so neither does the feature at a given time.

    Args:
        gram: measured on ``times`` [steps + 1].
        wanted: another schedule [steps' + 1] within it, possibly finer.

    Raises:
        ValueError: if it reaches outside of the measured times.
    """
    stencil, steps = Stencil.between(times, wanted), len(wanted) - 1
    weights = torch.zeros(steps + 1, gram.num_steps + 1, dtype=torch.float64)
    weights[:-1].scatter_(1, stencil.nodes, stencil.weights)
    weights[-1, -1] = 1  # the constant
    result = GramMatrix(steps)
    result.matrix = weights @ gram.matrix @ weights.T
    return result
