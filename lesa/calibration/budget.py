"""How many steps of a generation may be full."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lesa.arguments import real, whole
from lesa.tables.evaluation_times import evaluation_times
from lesa.tables.plan import StepPlan

FEWEST = 2  # full steps of a generation: with one alone, every other step would repeat it
BUDGETS = ("speedup", "full_steps", "evaluations", "max_error")
MOST_SPEEDUP = 50.0  # needs a schedule of 100 steps


class BestPlans(Protocol):
    """A calibration, as far as a budget needs it."""

    times: Tensor

    def plan(self, full_steps: int, *, times: Tensor) -> StepPlan:
        """The best plan with so many full steps."""

    def evaluation_times(self, evaluations: int) -> Tensor:
        """The best times [evaluations + 1] for so many evaluations."""

    def curve(self, times: Tensor) -> dict[int, float]:
        """The predicted error for every number of full steps, from the fewest on."""


@dataclass(frozen=True)
class Budget:
    """How many steps may be full: a function of the times of a generation that returns a plan.

    A budget is a wish. A schedule that is too short for it gets the full steps that it needs, at least two, and
    :meth:`note` says so.

    Args:
        speedup: at least so many times fewer full steps than steps, 1 to 50.
        full_steps: in its place, exactly so many full steps.
        evaluations: in its place, so many full steps at times that are good where steps are divided into substeps; all
            steps of a shorter schedule.
        max_error: in its place, the fewest full steps that keep this predicted error; needs a calibration.
        calibration: has the best plan for each number of full steps; None: full steps are evenly spaced in noise level,
            or of ``evaluations`` at :func:`evaluation_times`.

    Raises:
        ValueError: for none or several of the four, or a number that makes no sense.
    """

    speedup: float | None = None
    full_steps: int | None = None
    evaluations: int | None = None
    max_error: float | None = None
    calibration: BestPlans | None = None

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"say one of speedup=, full_steps=, evaluations= and max_error=, not {given}")
        if self.speedup is not None:
            real("speedup", self.speedup, least=1, most=MOST_SPEEDUP)
        if self.full_steps is not None:
            whole("full_steps", self.full_steps, least=1)
        if self.evaluations is not None:
            whole("evaluations", self.evaluations, least=1)
        if self.max_error is not None:
            real("max_error", self.max_error, above=0)
            if self.calibration is None:
                raise ValueError("max_error needs a calibration: lesa.calibrate(pipeline, prompts)")

    def __call__(self, times: Tensor) -> StepPlan:
        """The plan for noise levels [steps + 1]."""
        steps = len(times) - 1
        if self.calibration is not None and self.max_error is not None:
            for count, error in self.calibration.curve(times).items():
                if error <= self.max_error and count >= FEWEST:
                    return self.calibration.plan(count, times=times)
            return StepPlan(steps, range(steps))
        count = min(steps, max(FEWEST, self._wanted(steps)))
        if self.evaluations is not None:
            if count == steps:
                return StepPlan(steps, range(steps))
            best = evaluation_times(times, count)
            if self.calibration is not None and count < len(self.calibration.times) - 1:
                best = self.calibration.evaluation_times(count)
            return StepPlan.nearest(times, best[:-1])
        return StepPlan.even(times, count) if self.calibration is None else self.calibration.plan(count, times=times)

    def _wanted(self, steps: int) -> int:
        if self.full_steps is not None:
            return self.full_steps
        if self.evaluations is not None:
            return self.evaluations
        assert self.speedup is not None, "max_error is not a number of steps"
        return int(steps / self.speedup + 1e-9)

    def note(self, plan: StepPlan) -> str:
        """A sentence if a plan does not keep this budget; else empty."""
        steps, count = plan.num_steps - plan.start, len(plan.full_steps)
        if self.max_error is not None:
            kept = count < steps or steps <= FEWEST
            return "" if kept else f"no plan of {steps} steps keeps max_error={self.max_error:g}: all steps are full"
        if count == self._wanted(steps) or (self.evaluations is not None and count >= min(steps, FEWEST)):
            return ""
        wish = f"speedup={self.speedup:g}" if self.full_steps is None else f"full_steps={self.full_steps}"
        return f"{steps} steps are too few for {wish}: {count} of them are full, {plan.speedup:.2f}x"
