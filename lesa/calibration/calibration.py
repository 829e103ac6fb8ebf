"""What a calibration knows: inner products for each stream, and the best plan for every budget."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.budget import Budget
from lesa.calibration import storing
from lesa.calibration.errors import ErrorGram
from lesa.calibration.gram import GramMatrix
from lesa.calibration.planning import sample_error, search_plans
from lesa.calibration.resampling import resample
from lesa.forecasters.least_squares import relative_error
from lesa.forecasters.path_least_squares import PathLeastSquares
from lesa.hub import CALIBRATION_FILE
from lesa.plan import StepPlan
from lesa.runtime.driver import Stream
from lesa.schedule import TOLERANCE, as_times, same_times
from lesa.table import CoefficientTable

FEWEST_SAVED = 2  # a plan with less than two full steps saved is no plan worth keeping


@dataclass
class Measured:
    """Of one stream: inner products of its features, and of their errors behind the head where that is known.

    A stream may take part in some steps of the schedule only, from ``first`` on: a second transformer, guidance that
    ends early.
    """

    gram: GramMatrix
    head: ErrorGram | None = None
    first: int = 0
    _of_features: tuple[Tensor, int, ErrorGram] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def errors(self) -> ErrorGram:
        """Behind the head, or else those of the features."""
        if self.head is not None:
            return self.head
        matrix = self.gram.matrix
        if self._of_features is None or self._of_features[:2] != (matrix, matrix._version):
            self._of_features = matrix, matrix._version, ErrorGram.from_gram(self.gram)
        return self._of_features[2]


@dataclass(repr=False)
class Calibration:
    """Inner products by stream, and what they were measured on.

    Attributes:
        times: the schedule, noise levels [steps + 1] float64.
        streams: what was measured, by (component, branch).
        model: the class and a hash of the configuration of each transformer, by component.
        settings: what else it holds for: the shape of a feature, guidance.
        requests: names of the calls that are in it, so that none is counted twice.
        samples: images or videos in it.
        token_error: how far the error of reuse on the chosen tokens was from that on all of them, relative.
        plans: the best plan found for each number of full steps.
    """

    times: Tensor
    streams: dict[Stream, Measured]
    model: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    samples: int = 0
    token_error: float = 0.0
    plans: dict[int, StepPlan] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def merge(self, other: "Calibration") -> None:
        """Add what another machine measured on other prompts; plans have to be searched again.

        Raises:
            ValueError: if it was made for another model, schedule or streams, or it holds a call that is here already.
        """
        if other.model != self.model or list(other.streams) != list(self.streams):
            raise ValueError(f"a calibration of {other.describe()} cannot be merged into one of {self.describe()}")
        if not same_times(self.times, other.times):
            raise ValueError("these calibrations were made on different schedules")
        if [(m.first, m.gram.num_steps) for m in other.streams.values()] != [
            (m.first, m.gram.num_steps) for m in self.streams.values()
        ]:
            raise ValueError(
                "these calibrations have streams on different steps, such as guidance that ends at another one; "
                "calibrate each on its own"
            )
        if [m.head is None for m in other.streams.values()] != [m.head is None for m in self.streams.values()]:
            raise ValueError(
                "only one of these calibrations knows the end of the model, which an adapter or another version of "
                "diffusers may have hidden; calibrate both in the same way"
            )
        if set(self.requests) & set(other.requests):
            raise ValueError("both calibrations hold the same call; give each machine other prompts or another seed")
        for stream, measured in self.streams.items():
            theirs = other.streams[stream]
            measured.gram.merge(theirs.gram)
            if measured.head is not None and theirs.head is not None:
                measured.head.merge(theirs.head)
        self.token_error = max(self.token_error, other.token_error)
        self.requests += other.requests
        self.samples += other.samples
        self.plans = {}

    def errors(self, stream: Stream | None = None, times: Tensor | None = None) -> ErrorGram:
        """Errors of one stream, or of all together, on the calibrated schedule or another one.

        Raises:
            ValueError: for an unknown stream, or a schedule that this calibration says nothing about.
        """
        if stream is not None and stream not in self.streams:
            raise ValueError(f"nothing was calibrated for {stream}, only for {sorted(self.streams)}")
        chosen = list(self.streams.values()) if stream is None else [self.streams[stream]]
        if times is None or same_times(as_times(times, len(times) - 1), self.times):
            parts = [measured.errors.within(measured.first, self.num_steps) for measured in chosen]
        else:
            parts = [self._at_other_times(measured, as_times(times, len(times) - 1)) for measured in chosen]
        if len(parts) == 1:
            return parts[0]
        total = ErrorGram.empty(parts[0].num_steps)
        for part in parts:
            total.merge(part)
        return total

    def _at_other_times(self, measured: Measured, times: Tensor) -> ErrorGram:
        """The errors of a stream on another schedule; of one that takes part in some steps, at the times of these."""
        steps, first = measured.gram.num_steps, measured.first
        own = self.times[first : first + steps + 1]
        if steps == self.num_steps:
            return ErrorGram.from_gram(resample(measured.gram, own, times))
        known = own[:-1]
        near = (times[:-1] <= known.max() + TOLERANCE) & (times[:-1] >= known.min() - TOLERANCE)
        inside = near.nonzero().flatten()
        if not len(inside):
            return ErrorGram.empty(len(times) - 1)
        begin, end = int(inside[0]), int(inside[-1]) + 1
        part = ErrorGram.from_gram(resample(measured.gram, own, times[begin : end + 1]))
        return part.within(begin, len(times) - 1)

    def forecasters(self) -> dict[Stream, "Calibrated"]:
        """The default forecaster of each stream."""
        return {stream: Calibrated(self, stream) for stream in self.streams}

    def plan(
        self,
        full_steps: int | None = None,
        *,
        speedup: float | None = None,
        max_error: float | None = None,
        times: Tensor | None = None,
    ) -> StepPlan:
        """The best plan for a budget; one of the three has to be given.

        Args:
            full_steps: how many steps run in full.
            speedup: at least so many times fewer full steps than steps.
            max_error: the fewest full steps with a predicted :func:`sample_error` of at most this.
            times: another schedule than the calibrated one.

        Raises:
            ValueError: for none or several of them, a budget out of range, or a bound that no plan keeps.
        """
        if sum(given is not None for given in (full_steps, speedup, max_error)) != 1:
            raise ValueError("say one of full_steps=, speedup= and max_error=")
        steps = self.num_steps if times is None else len(times) - 1
        if max_error is not None:
            real("max_error", max_error, least=0)
            for budget, error in self.curve(times).items():
                if error <= max_error:
                    return self._plans(times, [budget])[budget]
            raise ValueError(f"no plan that saves a step keeps an error of {max_error}")
        if speedup is not None:
            real("speedup", speedup, least=1)
            full_steps = int(steps / speedup + 1e-9)
        assert full_steps is not None
        whole("full_steps", full_steps, least=1, most=steps)
        return self._plans(times, [full_steps])[full_steps]

    def planner(self, **budget: Any) -> Budget:
        """:meth:`plan` as a function of the times of a generation, for :func:`lesa.enable`; a wish, not a demand."""
        return Budget(**budget, calibration=self)

    def curve(self, times: Tensor | None = None) -> dict[int, float]:
        """Predicted error of the sample for every number of full steps, from the fewest on."""
        errors = self.errors(times=times)
        chosen = self.times if times is None else times
        plans = self._plans(times, list(range(1, errors.num_steps - FEWEST_SAVED + 1)))
        return {budget: sample_error(errors, plan, chosen) for budget, plan in plans.items()}

    def search(self, *, progress: bool = True) -> None:
        """Find the best plan for every budget, so that :meth:`plan` answers at once."""
        budgets = list(range(1, self.num_steps - FEWEST_SAVED + 1))
        self.plans = search_plans(self.errors(), self.times, budgets, progress=progress)

    def _plans(self, times: Tensor | None, budgets: list[int]) -> dict[int, StepPlan]:
        native = times is None or same_times(as_times(times, len(times) - 1), self.times)
        missing = [b for b in budgets if not native or b not in self.plans]
        chosen = self.times if native or times is None else times
        found = search_plans(self.errors(times=times), chosen, missing, progress=False) if missing else {}
        if native:
            self.plans |= found
        return {b: self.plans[b] if b in self.plans and native else found[b] for b in budgets}

    def describe(self) -> str:
        """One line: model, steps, samples."""
        models = ", ".join(f"{name} {kind}" for name, kind in self.model.items())
        return f"{models} in {self.num_steps} steps on {self.samples} samples"

    def __repr__(self) -> str:
        return f"<lesa.Calibration of {self.describe()}>"

    def check_model(self, model: Mapping[str, str]) -> None:
        """Raises a ValueError if a calibration was made for other transformers than these."""
        for component, kind in self.model.items():
            if model.get(component) != kind:
                raise ValueError(
                    f"this calibration was made for {component} {kind}, the pipeline has {model.get(component)}; "
                    "calibrate it: lesa.calibrate(pipeline, prompts)"
                )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: all numbers, and the rest as JSON in its header. A folder gets the usual name.

        Raises:
            OSError: that names the file, if it cannot be written.
        """
        storing.save(self, storing.file_of(path))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what :meth:`save` wrote: the file, or the folder it is in.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is damaged or something else; it names the file.
        """
        path = Path(path)
        path = path / CALIBRATION_FILE if path.is_dir() else path
        times, parts, fields = storing.load(path)
        streams = {stream: Measured(*part) for stream, part in parts.items()}
        return cls(times, streams, **fields)


@dataclass(frozen=True, eq=False, repr=False)
class Calibrated:
    """The default forecaster of a calibrated stream: least squares along the path, for any schedule it knows."""

    calibration: Calibration
    stream: Stream
    path: float = 1.0
    history: int | None = None
    needs_times: ClassVar[bool] = True

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        times = as_times(times, plan.num_steps)
        if plan.start and not same_times(times, self.calibration.times):  # what is left may be what was calibrated
            made = self.table(plan.within(plan.start, plan.num_steps - plan.start), times[plan.start :])
            return CoefficientTable(plan, times, made.coefficients, made.bias)
        errors = self.calibration.errors(self.stream, times)
        return PathLeastSquares(errors, path=self.path, history=self.history).table(plan, times)

    @property
    def state(self) -> tuple[int, ...]:
        """Changes when something is merged into the calibration, so that no older table is used."""
        measured = self.calibration.streams[self.stream]
        held = [measured.gram.matrix, *([] if measured.head is None else [measured.head.matrix])]
        return tuple(number for matrix in held for number in (id(matrix), matrix._version))

    def expected_error(self, table: CoefficientTable) -> Tensor:
        """Relative error [steps] of a table on the calibrated features, for :class:`lesa.Guard`."""
        gram, times = self.calibration.streams[self.stream].gram, self.calibration.times
        if gram.num_steps != len(times) - 1 or table.plan.start:  # known for some of its steps only
            return torch.full((table.plan.num_steps,), torch.inf, dtype=torch.float64)
        if not same_times(table.times, times):
            gram = resample(gram, times, table.times)
        return relative_error(gram, table)

    def __repr__(self) -> str:
        return f"Calibrated({self.calibration!r}, {self.stream})"

    def limited(self, history: int) -> "Calibrated":
        """With predictions from the latest ``history`` full features only."""
        return dataclasses.replace(self, history=min(whole("history", history, least=1), self.history or history))
