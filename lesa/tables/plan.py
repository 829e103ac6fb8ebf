"""Which steps of a generation are full."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lesa.arguments import whole


@dataclass(frozen=True)
class StepPlan:
    """The full steps of a generation; all others are predicted.

    Args:
        num_steps: evaluations of the transformer for one branch.
        full_steps: distinct steps, among them the first that runs.
        start: the first step that runs, if a generation starts part-way through its schedule (image to image).

    Raises:
        ValueError: if the first step is not full, or a step is repeated or out of range.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    start: int = 0

    def __init__(self, num_steps: int, full_steps: Iterable[int], *, start: int = 0) -> None:
        num_steps, start = whole("num_steps", num_steps, least=1), whole("start", start, least=0)
        steps = tuple(sorted(whole("each of full_steps", step) for step in _each_of(full_steps)))
        if not steps or steps[0] > start:
            raise ValueError(
                f"step {start} must be full, since nothing is known before it; full steps are {list(steps)}"
            )
        if steps[0] < start or steps[-1] >= num_steps:
            outside = [step for step in steps if not start <= step < num_steps]
            raise ValueError(f"full steps {outside} lie outside {start} ... {num_steps - 1}")
        repeated = sorted({a for a, b in itertools.pairwise(steps) if a == b})
        if repeated:
            raise ValueError(f"full steps {repeated} are given more than once")
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "full_steps", steps)
        object.__setattr__(self, "start", start)

    @classmethod
    def paper(cls, num_steps: int, interval: int, warmup: int = 3) -> "StepPlan":
        """LESA's schedule: the first ``warmup`` steps, then every ``interval``-th, and always step 3.

        Step 3 does not shift the steps after it: 50 steps with interval 7 run 0-3, 9, 16, 23, 30, 37 and 44 in full.

        Source: the released scheduler of LESA, https://arxiv.org/abs/2602.20497.
        """
        whole("num_steps", num_steps, least=1)
        whole("interval", interval, least=1)
        whole("warmup", warmup, least=1)
        full = {*range(warmup), 3, *range(warmup - 1, num_steps, interval)}
        return cls(num_steps, (step for step in full if step < num_steps))

    def starting_at(self, start: int) -> "StepPlan":
        """The rest of this plan from step ``start`` on, which is made full."""
        return StepPlan(self.num_steps, {start, *(step for step in self.full_steps if step >= start)}, start=start)

    def within(self, first: int, num_steps: int) -> "StepPlan":
        """The part of this plan from step ``first`` on, counted from 0; the first step that runs is made full."""
        start = max(self.start - first, 0)
        full = (step - first for step in self.full_steps if first + start < step < first + num_steps)
        return StepPlan(num_steps, {start, *full}, start=start)

    @classmethod
    def even(cls, times: Sequence[float] | Tensor, num_full: int) -> "StepPlan":
        """Full steps evenly spaced in noise level, including the first and the last step.

        The feature is a smooth function of the noise level, so this is the best plan without a calibration. A time
        shift puts most steps near the noise, and the paper's plan puts most full steps there too.

        Args:
            times: noise levels [steps + 1] of the schedule, ending on the level after the last step.
            num_full: how many steps run in full.

        Raises:
            ValueError: for a number of full steps that is not 1 ... steps.
        """
        first, last = (float(times[step]) for step in (0, -2))
        whole("num_full", num_full, least=1, most=len(times) - 1)
        return cls.nearest(times, [first + (last - first) * i / max(1, num_full - 1) for i in range(num_full)])

    @classmethod
    def nearest(cls, times: Sequence[float] | Tensor, wanted: Sequence[float] | Tensor) -> "StepPlan":
        """Full steps nearest to given noise levels, each another one.

        Args:
            times: noise levels [steps + 1] of the schedule, ending on the level after the last step.
            wanted: falling noise levels, the first of which is taken for the first step; at most one for each step.
        """
        levels = [float(time) for time in times][:-1]
        full: list[int] = []
        for i, level in enumerate(float(level) for level in wanted):
            latest = len(levels) - len(wanted) + i if i else 0  # leaves room for the remaining full steps
            first = max(i, full[-1] + 1 if full else 0)
            full.append(min(range(first, latest + 1), key=lambda step: abs(levels[step] - level)))
        return cls(len(levels), full)

    @property
    def predicted_steps(self) -> tuple[int, ...]:
        full = set(self.full_steps)
        return tuple(step for step in range(self.start, self.num_steps) if step not in full)

    @property
    def speedup(self) -> float:
        """The ideal speed-up, steps / full steps, if predicted steps cost nothing."""
        return (self.num_steps - self.start) / len(self.full_steps)

    def is_full(self, step: int) -> bool:
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} lies outside 0 ... {self.num_steps - 1}")
        return step in self.full_steps

    def __str__(self) -> str:
        """A character for each step: ``#`` full, ``.`` predicted, ``-`` before the first that runs."""
        marks = ("#" if self.is_full(step) else "." for step in range(self.start, self.num_steps))
        return "-" * self.start + "".join(marks)


def _each_of(full_steps: Iterable[int]) -> Iterable[int]:
    if not isinstance(full_steps, Iterable):
        raise ValueError(f"full_steps must be a list of steps that begins with the first, not {full_steps!r:.80}")
    return full_steps
