"""Substeps: each step of a sampler divided into finer ones, at which the output is predicted."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times

FINE = 200  # substeps of a generation. The error of 200 Euler steps is a quarter of that of 50; a substep costs little


@dataclass(frozen=True, eq=False)
class Substeps:
    """The fine schedule of a generation. A sampler that moves the sample by ``output * length of the step`` can be
    given the mean output over a step, and makes all of its substeps at once.

    Attributes:
        times: noise levels [substeps + 1] float64.
        first: [steps + 1], the first substep of each step, and the number of all substeps.
        lengths: [steps] of the steps, in noise level.
        weights: [steps], the length of each substep of a step as a share of the step.
        middles: [steps], the mean of the times of the substeps.
    """

    times: Tensor
    first: tuple[int, ...]
    lengths: tuple[float, ...] = field(init=False)
    weights: tuple[list[float], ...] = field(init=False)
    middles: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = [-self.times[a : b + 1].diff() for a, b in itertools.pairwise(self.first)]
        totals = [float(part.sum()) for part in parts]
        shares = [
            part / n if n else torch.full_like(part, 1 / len(part)) for part, n in zip(parts, totals, strict=True)
        ]
        middles = [float(w @ self.times[a : a + len(w)]) for w, a in zip(shares, self.first, strict=False)]
        object.__setattr__(self, "lengths", tuple(totals))
        object.__setattr__(self, "weights", tuple(share.tolist() for share in shares))
        object.__setattr__(self, "middles", tuple(middles))

    @classmethod
    def divide(cls, times: Tensor | Sequence[float], substeps: int | None = None) -> "Substeps":
        """Divide every step of a schedule ``times`` [steps + 1] into equal parts.

        Args:
            substeps: parts of each step; None: ``FINE`` for the whole schedule, as many for each step as its length
                asks for.
        """
        times = as_times(times, len(times) - 1)
        lengths = times[:-1] - times[1:]
        if substeps is None:
            counts = (FINE * lengths / lengths.sum().clamp(min=1e-12)).round().long().clamp(min=1)
        else:
            counts = torch.full_like(lengths, substeps, dtype=torch.long)
        parts = [a + (b - a) * torch.arange(int(n)) / n for a, b, n in zip(times, times[1:], counts, strict=False)]
        return cls(torch.cat([*parts, times[-1:]]), tuple(itertools.accumulate(counts.tolist(), initial=0)))

    def plan(self, plan: StepPlan) -> StepPlan:
        """The same plan on the fine schedule: the first substep of a full step is full, all others are predicted."""
        full = [self.first[step] for step in plan.full_steps]
        return StepPlan(self.first[-1], full, start=self.first[plan.start])

    def of(self, step: int) -> range:
        """The substeps of a step."""
        return range(self.first[step], self.first[step + 1])
