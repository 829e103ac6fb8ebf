"""Where to evaluate a model that nothing is known about: times for a number of evaluations."""

import torch
from torch import Tensor

from lesa.arguments import whole
from lesa.tables.times import as_times

# Chosen on small models of pictures and of digits, with and without guidance (docs/evaluations.md). Alone, digits would
# ask for times even in noise level, and pictures for those of the sampler.
SHIFT = 0.25  # of the logarithm of the sampler's time shift
LAST = 0.03  # the last time; a later one leaves too few for the rest, an earlier one too much without an evaluation
MOST_EVEN = 0.6  # the last time for many evaluations, relative to the distance of even ones


def evaluation_times(schedule: Tensor, count: int) -> Tensor:
    """Times [count + 1] for the same range as a schedule, between its own and times even in noise level.

    A schedule with time shift s has its middle at s / (1 + s). These have the shift ``s**SHIFT``, and a last evaluation
    so late that little is left to predict without an evaluation after it.

    Args:
        schedule: noise levels [steps + 1].
        count: evaluations.
    """
    schedule = as_times(schedule, len(schedule) - 1)
    whole("count", count, least=1)
    first, end = schedule[0], schedule[-1]
    middle = float(((schedule[:-1].median() - end) / (first - end)).clamp(0.5, 0.999))
    shift = (middle / (1 - middle)) ** SHIFT
    last = min(LAST, MOST_EVEN / count)
    lowest = last / (shift - (shift - 1) * last)  # what the shift maps to the last time
    even = torch.linspace(1, lowest, count, dtype=torch.float64)
    levels = shift * even / (1 + (shift - 1) * even)
    return torch.cat([end + (first - end) * levels, schedule[-1:]])
