"""The guard: at every full step, what would have been predicted of it is compared with the truth.

The comparison is one pass over the kept features, which no predicted step waits for: its two sums are copied to the
host meanwhile and read one interval later.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.calibration.gram import GramMatrix
from lesa.forecasters import Forecaster
from lesa.forecasters.least_squares import relative_error
from lesa.plan import StepPlan
from lesa.runtime.driver import Stream
from lesa.table import CoefficientTable

ExpectedError = Callable[[CoefficientTable], Tensor]  # the calibrated relative error [steps] of a table


@dataclass(frozen=True)
class Guard:
    """How far predictions may be off, and what is done about it.

    Errors are relative: the length of the difference over the length of the true feature.

    Args:
        max_error: the largest one that is still good. None: ``factor`` times what the calibration measured, where the
            forecaster knows that (``expected_error``); where it does not, errors are only reported.
        extra_steps: full steps beyond the plan that a generation may spend. After a full step with too high an error
            the interval after the next full step is cut in half. 0: only warn.
        factor: how far above the calibrated error is too high.
        calibration: the Gram matrix of the features that the forecaster was calibrated on, or one for each (component,
            branch): it tells the error to expect of any forecaster. None: the forecaster's own ``expected_error``.

    Raises:
        ValueError: for a limit that is not positive or a negative number of steps.
    """

    max_error: float | None = None
    extra_steps: int = 0
    factor: float = 3.0
    calibration: GramMatrix | Mapping[Stream, GramMatrix] | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None:
            real("max_error", self.max_error, above=0)
        real("factor", self.factor, above=0)
        whole("extra_steps", self.extra_steps, least=0)

    def limit(self, expected: float | None) -> float:
        """The largest error that is good where ``expected`` was measured; infinite if nothing is known."""
        if self.max_error is not None:
            return self.max_error
        return float("inf") if expected is None else self.factor * expected


@dataclass(frozen=True, eq=False)
class Probes:
    """What would be predicted of each full step from the full steps before it.

    Attributes:
        coefficients: [full, full] float64, as the table's; row 0 is empty.
        bias: [full].
        expected: the relative error of each that the calibration measured, where it is known.
    """

    coefficients: Tensor
    bias: Tensor
    expected: dict[int, float]


def make_probes(
    make_table: Callable[[StepPlan], CoefficientTable], plan: StepPlan, expected_of: ExpectedError | None = None
) -> Probes:
    """The probes of a plan: each full step in turn is made a predicted one, and its row of that table taken."""
    full = plan.full_steps
    coefficients = torch.zeros(len(full), len(full), dtype=torch.float64)
    bias = torch.zeros(len(full), dtype=torch.float64)
    expected = {}
    for slot, step in enumerate(full[1:], start=1):
        table = make_table(StepPlan(plan.num_steps, (*full[:slot], *full[slot + 1 :]), start=plan.start))
        row = table.plan.predicted_steps.index(step)
        coefficients[slot, :slot] = table.coefficients[row, :slot]
        bias[slot] = table.bias[row]
        if expected_of is not None:
            expected[step] = float(expected_of(table)[step])
    return Probes(coefficients, bias, expected)


def expected_error(guard: Guard, forecaster: Forecaster, stream: Stream, plan: StepPlan) -> ExpectedError | None:
    """How the calibrated relative error of the steps of such a plan is found, if anybody knows it.

    A forecaster may have an attribute ``expected_error``: a number, or a function of a table that returns one for each
    step.
    """
    gram = guard.calibration.get(stream) if isinstance(guard.calibration, Mapping) else guard.calibration
    if gram is not None:
        return partial(relative_error, gram) if gram.num_steps == plan.num_steps else None
    known = getattr(forecaster, "expected_error", None)
    if known is None or callable(known):
        return known
    return lambda table: torch.full((table.plan.num_steps,), float(known))


class Watch:
    """The errors of one generation in one branch, as they arrive.

    Args:
        guard: what is done about them.
        where: names the branch in a warning.
        warn: says what is to be said.

    Attributes:
        expected: the calibrated error by full step, of the plan that is followed.
        extra: full steps spent beyond the first plan.
    """

    def __init__(self, guard: Guard, where: str, warn: Callable[[str], None]) -> None:
        self.expected: dict[int, float] = {}
        self.extra: list[int] = []
        self._guard = guard
        self._where = where
        self._warn = warn
        self._errors: dict[int, float] = {}
        self._under_way: list[tuple[int, Tensor, torch.cuda.Event | None]] = []
        self._warned = False

    def note(self, step: int, figures: Tensor) -> None:
        """Squared error and size of a full step, [2] on the device; several heads are judged by the worst."""
        arrived = None
        if figures.is_cuda:
            host = torch.empty(2, dtype=figures.dtype, pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._under_way.append((step, figures, arrived))

    def errors(self) -> dict[int, float]:
        """The relative error of each full step after the first; waits for what is under way."""
        self.read(wait=True)
        return dict(self._errors)

    def read(self, *, wait: bool) -> None:
        """Take what has arrived, and warn of an error that is too high while nothing is done about it."""
        while self._under_way:
            step, figures, arrived = self._under_way[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            del self._under_way[0]
            error, size = figures.tolist()
            relative = (error / size) ** 0.5 if size else 0.0 if error == 0 else float("inf")
            self._errors[step] = max(relative, self._errors.get(step, 0.0), key=lambda e: (e != e, e))
            if self._too_high(step) and len(self.extra) >= self._guard.extra_steps and not self._warned:
                self._warned = True
                expected = self.expected.get(step)
                self._warn(
                    f"{self._where}: what would have been predicted of full step {step} is off by {relative:.1%} of "
                    f"its length, more than {self._guard.limit(expected):.1%}"
                    + ("" if expected is None else f" (calibrated: {expected:.1%})")
                    + "; calibrate on these prompts and settings, or run more full steps"
                )

    def revised(self, plan: StepPlan, step: int) -> StepPlan:
        """The plan from full step ``step`` on, given the errors before it."""
        spends = len(self.extra) < self._guard.extra_steps
        self.read(wait=spends)  # of one interval ago: hardly ever a wait, and the plan must not depend on the clock
        latest = max((s for s in self._errors if s < step), default=None)
        if not spends or latest is None or not self._too_high(latest):
            return plan
        following = min((full for full in plan.full_steps if full > step), default=plan.num_steps)
        middle = (step + following) // 2
        if middle == step:
            return plan
        self.extra.append(middle)
        return StepPlan(plan.num_steps, (*plan.full_steps, middle), start=plan.start)

    def _too_high(self, step: int) -> bool:
        return not self._errors[step] <= self._guard.limit(self.expected.get(step))  # NaN is too high
