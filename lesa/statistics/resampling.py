"""Resampling: the Gram matrix of another schedule of the same model, since features are smooth functions of time."""

import torch
from torch import Tensor

from lesa.statistics.gram import GramMatrix
from lesa.tables.times import TOLERANCE, as_times

NEIGHBOURS = 4  # a cubic through the nearest times


def resample(gram: GramMatrix, times: Tensor, wanted: Tensor) -> GramMatrix:
    """Inner products of the features at other times, each a cubic interpolation of those at the nearest four.

    The sampler's path hardly depends on its steps, so neither does the feature at a given time.

    Args:
        gram: measured on ``times`` [steps + 1].
        wanted: another schedule [steps' + 1] within it, of at most as many steps.

    Raises:
        ValueError: if it has more steps, or reaches outside of the measured times.
    """
    steps = len(wanted) - 1
    known, wanted = as_times(times, gram.num_steps)[:-1], as_times(wanted, steps)[:-1]
    if steps > gram.num_steps:
        raise ValueError(
            f"this calibration has {gram.num_steps} steps, the generation {steps}; calibrate with at least {steps}"
        )
    # The cubic is good for a gap before the first node and half a gap after the last. Another resolution of a pipeline
    # shifts its schedule by much less.
    gap, last = (known[:2].diff().abs(), known[-2:].diff().abs() / 2) if len(known) > 1 else (torch.zeros(1),) * 2
    if wanted.max() > known.max() + TOLERANCE + gap or wanted.min() < known.min() - TOLERANCE - last:
        raise ValueError(
            f"this calibration knows times from {float(known[0]):.4f} to {float(known[-1]):.4f}, the generation runs "
            f"from {float(wanted[0]):.4f} to {float(wanted[-1]):.4f}; calibrate on its schedule"
        )
    weights = torch.zeros(steps + 1, gram.num_steps + 1, dtype=torch.float64)
    for row, time in enumerate(wanted):
        nearest = (known - time).abs().topk(min(NEIGHBOURS, len(known)), largest=False).indices
        weights[row, nearest] = _lagrange(known[nearest], time)
    weights[-1, -1] = 1  # the constant
    result = GramMatrix(steps)
    result.matrix = weights @ gram.matrix @ weights.T
    return result


def _lagrange(nodes: Tensor, time: Tensor) -> Tensor:
    """The weights of the values at ``nodes`` in the polynomial through them, at one time."""
    others = ~torch.eye(len(nodes), dtype=torch.bool)
    ratio = torch.where(others, (time - nodes) / (nodes[:, None] - nodes), 1.0)
    return ratio.prod(1)
