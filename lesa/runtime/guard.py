"""The guard: at every full step, the prediction that was not needed is compared with the true feature.

The comparison is one pass over the kept features. No predicted step waits for it: its two sums are copied to the host
in the background and read one interval later.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.statistics.gram import GramMatrix
from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable

ExpectedError = Callable[[CoefficientTable], Tensor | None]  # the calibrated relative error [steps] of a table


@dataclass(frozen=True)
class Guard:
    """How far predictions may be off, and what is done about it.

    Errors are relative: the length of the difference over the length of the true feature.

    Args:
        max_error: the largest error that is accepted. None: ``factor`` times the error that the calibration measured,
            where the forecaster knows it (:meth:`lesa.Forecaster.expected_error`); elsewhere errors are only reported.
        extra_steps: full steps beyond the plan that a generation may spend. After a full step with too high an error
            the interval after the next full step is cut in half. 0: only warn.
        factor: how far above the calibrated error is too high.
        calibration: the Gram matrix of the calibrated features, or one for each (component, branch), to take the
            expected error from in place of the forecaster's own.

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
        """The largest error that is accepted where ``expected`` was calibrated; infinite if nothing is known."""
        if self.max_error is not None:
            return self.max_error
        return float("inf") if expected is None else self.factor * expected

    def expected_error(self, forecaster: Forecaster, stream: Stream, plan: StepPlan) -> ExpectedError:
        """The calibrated relative error of tables for this stream, as a function of the table."""
        gram = self.calibration.get(stream) if isinstance(self.calibration, Mapping) else self.calibration
        if gram is None:
            return forecaster.expected_error
        return gram.relative_error if gram.num_steps == plan.num_steps else lambda table: None


@dataclass(frozen=True, eq=False)
class Probes:
    """The prediction of each full step from the full steps before it.

    Attributes:
        coefficients: [full, full] float64, as in a table; row 0 is empty.
        bias: [full].
        expected: the calibrated relative error by full step, where it is known.
    """

    coefficients: Tensor
    bias: Tensor
    expected: dict[int, float]


def make_probes(
    make_table: Callable[[StepPlan], CoefficientTable],
    plan: StepPlan,
    expected_error: ExpectedError = lambda table: None,
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
        errors = expected_error(table)
        if errors is not None:
            expected[step] = float(errors[step])
    return Probes(coefficients, bias, expected)


class GuardMonitor:
    """The errors of one branch of one generation, as they arrive.

    Args:
        guard: what is done about them.
        where: names the branch in a warning.
        warn: gives the warning.

    Attributes:
        expected: the calibrated error by full step, under the current plan.
        extra: full steps spent beyond the first plan.
    """

    def __init__(self, guard: Guard, where: str, warn: Callable[[str], None]) -> None:
        self.expected: dict[int, float] = {}
        self.extra: list[int] = []
        self._guard = guard
        self._where = where
        self._warn = warn
        self._errors: dict[int, float] = {}
        self._in_flight: list[tuple[int, Tensor, torch.cuda.Event | None]] = []
        self._warned = False

    def note(self, step: int, sums: Tensor) -> None:
        """Squared error and squared size of a full step, [2] on the device; of several heads the worst counts."""
        arrived = None
        if sums.is_cuda:
            host = torch.empty(2, dtype=sums.dtype, pin_memory=True)
            sums = host.copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._in_flight.append((step, sums, arrived))

    def errors(self) -> dict[int, float]:
        """The relative error of each full step after the first; waits for copies in flight."""
        self.read(wait=True)
        return dict(self._errors)

    def read(self, *, wait: bool) -> None:
        """Read what has arrived, and warn once of an error that is too high if no full step can be spent on it."""
        while self._in_flight:
            step, sums, arrived = self._in_flight[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            del self._in_flight[0]
            error, size = sums.tolist()
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
        self.read(wait=spends)  # wait, do not poll: the revised plan must be the same in every run
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
