"""A calibration: statistics for each stream, and the best plan for every budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.calibration import storing
from lesa.calibration.budget import Budget
from lesa.calibration.calibrated import CalibratedForecaster
from lesa.calibration.measured import Measured
from lesa.calibration.planning import sample_error, search_plans
from lesa.files.hub import CALIBRATION_FILE
from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import OutputErrorGram
from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times, same_times

FEWEST_SAVED = 2  # predicted steps of a plan that is worth it


@dataclass(repr=False)
class Calibration:
    """The statistics of each stream, and what they were measured on.

    Attributes:
        times: the schedule, noise levels [steps + 1] float64.
        streams: what was measured, by (component, branch).
        model: the class and a hash of the configuration of each transformer, by component.
        settings: what else it depends on, such as the shape of a feature and guidance.
        requests: hashes of its calls, so that none is counted twice.
        samples: images or videos in it.
        token_error: relative difference between the chosen tokens and all tokens in their change from step to step.
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
        """Add a calibration of the same model on other prompts, such as one of another machine; plans are dropped.

        Raises:
            ValueError: if it was made for another model, schedule or streams, or it holds a call that is here already.
        """
        if other.model != self.model or list(other.streams) != list(self.streams):
            raise ValueError(f"a calibration of {other.describe()} cannot be merged into one of {self.describe()}")
        if not same_times(self.times, other.times):
            raise ValueError("these calibrations were made on different schedules")
        pairs = list(zip(self.streams.values(), other.streams.values(), strict=True))
        if any((a.first, a.gram.num_steps) != (b.first, b.gram.num_steps) for a, b in pairs):
            raise ValueError(
                "these calibrations have streams on different steps, such as guidance that ends at another one; "
                "calibrate each on its own"
            )
        if any((a.output_errors is None) != (b.output_errors is None) for a, b in pairs):
            raise ValueError(
                "only one of these calibrations knows the model's output head, which an adapter or another version of "
                "diffusers may have hidden; calibrate both in the same way"
            )
        if set(self.requests) & set(other.requests):
            raise ValueError("both calibrations hold the same call; give each machine other prompts or another seed")
        for mine, theirs in pairs:
            mine.merge(theirs)
        self.token_error = max(self.token_error, other.token_error)
        self.requests += other.requests
        self.samples += other.samples
        self.plans = {}

    def errors(self, stream: Stream | None = None, times: Tensor | None = None) -> OutputErrorGram:
        """The errors of one stream, or of all added up, on the calibrated schedule or another one.

        Raises:
            ValueError: for an unknown stream, or a schedule that the statistics cannot be interpolated to.
        """
        if stream is not None and stream not in self.streams:
            raise ValueError(f"nothing was calibrated for {stream}, only for {sorted(self.streams)}")
        chosen = list(self.streams.values()) if stream is None else [self.streams[stream]]
        times = self.times if times is None else as_times(times, len(times) - 1)
        parts = [measured.errors_at(times, self.times) for measured in chosen]
        if len(parts) == 1:
            return parts[0]
        total = OutputErrorGram.empty(parts[0].num_steps)
        for part in parts:
            total.merge(part)
        return total

    def forecasters(self) -> dict[Stream, "CalibratedForecaster"]:
        """The default forecaster of each stream."""
        return {s: CalibratedForecaster(s, m, self.times, self.model) for s, m in self.streams.items()}

    def check_model(self, model: Mapping[str, str]) -> None:
        """Raise a ValueError if it was made for other transformers than these (class and configuration, by name)."""
        for forecaster in self.forecasters().values():
            forecaster.check_model(model)

    def plan(
        self,
        full_steps: int | None = None,
        *,
        speedup: float | None = None,
        max_error: float | None = None,
        times: Tensor | None = None,
    ) -> StepPlan:
        """The best plan for a budget; exactly one of the first three arguments.

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
            full_steps = min(int(steps / speedup + 1e-9), self.num_steps)
        assert full_steps is not None
        whole("full_steps", full_steps, least=1, most=min(steps, self.num_steps))
        return self._plans(times, [full_steps])[full_steps]

    def evaluation_times(self, evaluations: int) -> Tensor:
        """The times [evaluations + 1] at which so many evaluations are worth most, and the end of the schedule."""
        return torch.cat([self.times[list(self.plan(evaluations).full_steps)], self.times[-1:]])

    def planner(self, **budget: Any) -> Budget:
        """:meth:`plan` as a function of the times of a generation, for :func:`lesa.enable`; see :class:`Budget`."""
        return Budget(**budget, calibration=self)

    def curve(self, times: Tensor | None = None) -> dict[int, float]:
        """The predicted error of the sample for every number of full steps, from 1 on."""
        errors = self.errors(times=times)
        chosen = self.times if times is None else times
        plans = self._plans(times, list(range(1, min(errors.num_steps, self.num_steps) - FEWEST_SAVED + 1)))
        return {budget: sample_error(errors, plan, chosen) for budget, plan in plans.items()}

    def search(self, *, progress: bool = True) -> None:
        """Find the best plan for every budget, so that :meth:`plan` is immediate."""
        budgets = list(range(1, self.num_steps - FEWEST_SAVED + 1))
        self.plans = search_plans(self.errors(), self.times, budgets, progress=progress)

    def _plans(self, times: Tensor | None, budgets: list[int]) -> dict[int, StepPlan]:
        native = times is None or same_times(as_times(times, len(times) - 1), self.times)
        missing = [b for b in budgets if not native or b not in self.plans]
        chosen = self.times if native or times is None else times
        if len(chosen) > len(self.times):  # a search among so many steps would take minutes
            best = self._plans(None, missing)
            found = {b: StepPlan.nearest(chosen, self.times[list(plan.full_steps)]) for b, plan in best.items()}
        else:
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

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a JSON description; in a folder it is ``calibration.safetensors``.

        Raises:
            OSError: that names the file, if it cannot be written.
        """
        fields = {name: getattr(self, name) for name in ("model", "settings", "requests", "samples", "token_error")}
        storing.save(storing.file_of(path), self.times, self.streams, list(self.plans.values()), fields)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what :meth:`save` wrote: the file, or the folder it is in.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is damaged or something else; it names the file.
        """
        path = Path(path)
        path = path / CALIBRATION_FILE if path.is_dir() else path
        times, streams, fields = storing.load(path)
        return cls(times, streams, **fields)


def optimize_plan(
    measured: GramMatrix | OutputErrorGram | Calibration,
    num_full: int,
    *,
    times: Tensor | Sequence[float] | None = None,
    forecaster: Forecaster | None = None,
) -> StepPlan:
    """The full steps with the smallest predicted error of the sample.

    Args:
        measured: what was calibrated; of a plain Gram matrix, errors count on the features themselves.
        num_full: how many steps run in full.
        times: the schedule, [steps] or [steps + 1]; None: the calibrated one, or steps of equal length.
        forecaster: the plan is for this one; None: for :class:`PathLeastSquares`, the best of all tables.

    Raises:
        ValueError: for a number of full steps that is not 1 ... steps.
    """
    if isinstance(measured, GramMatrix):
        measured = OutputErrorGram.from_gram(measured)
    if isinstance(measured, OutputErrorGram):
        errors = measured
        times = torch.linspace(1, 0, errors.num_steps + 1, dtype=torch.float64) if times is None else times
    else:
        times = measured.times if times is None else _with_end(times, measured.num_steps)
        if forecaster is None:
            return measured.plan(num_full, times=times)  # which knows plans that were refined
        errors = measured.errors(times=times)
    times = as_times(times, errors.num_steps)
    return search_plans(errors, times, [num_full], forecaster=forecaster, progress=False)[num_full]


def _with_end(times: Tensor | Sequence[float], num_steps: int) -> Tensor:
    """Times [steps + 1] of a schedule that may lack its final time; ``num_steps``: the usual number of steps."""
    given = torch.as_tensor(times, dtype=torch.float64)
    ends = len(given) == num_steps + 1 or (len(given) != num_steps and float(given[-1]) == 0)
    return as_times(given, len(given) - ends)
