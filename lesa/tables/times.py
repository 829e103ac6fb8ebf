"""The times of a generation: the noise level of each step, from 1 (noise) to 0 (image), and the level at its end."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-4  # float32 schedulers differ by 1e-7, bf16 ones by 4e-3; another time shift by more than 1e-2


def as_times(times: Tensor | Sequence[float], num_steps: int) -> Tensor:
    """Times as float64 [num_steps + 1] on the host; a missing last one is 0, the image.

    Args:
        times: one noise level for each step, optionally followed by the level after the last step.

    Raises:
        ValueError: for another number of times, or times that are not finite or rise.
    """
    given = times if isinstance(times, Tensor) else torch.as_tensor(times, dtype=torch.float64)
    given = given.detach().to("cpu", torch.float64)
    if given.ndim != 1 or len(given) not in (num_steps, num_steps + 1):
        raise ValueError(
            f"{num_steps} steps need {num_steps} times, or {num_steps + 1} with the final one, not {list(given.shape)}"
        )
    if len(given) == num_steps:
        given = torch.cat([given, given.new_zeros(1)])
    levels = given.tolist()
    if not all(map(math.isfinite, levels)) or any(after > before for before, after in itertools.pairwise(levels)):
        raise ValueError(f"times must be finite and fall from noise (1) to image (0), not {levels}")
    return given


def same_times(a: Tensor, b: Tensor) -> bool:
    """Whether two schedules agree to within what float32 schedulers differ by."""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE)


def shown(times: Sequence[float]) -> str:
    """A schedule for people: its ends."""
    numbers = [f"{time:.4f}" for time in times]
    return ", ".join(numbers if len(numbers) <= 6 else [*numbers[:3], "...", *numbers[-2:]])


def difference(made_for: Tensor, given: Tensor) -> str:
    """What two schedules of as many steps are, and where they differ most, for a message."""
    step = int((made_for - given).abs().argmax())
    return (
        f"it was made for the noise levels {shown(made_for.tolist())} and is given {shown(given.tolist())}, "
        f"furthest apart at step {step}: {made_for[step]:.4f} and {given[step]:.4f}"
    )
