"""The default forecaster of a calibrated stream: least squares along the path, for any schedule that it knows."""

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.arguments import whole
from lesa.calibration.measured import Measured
from lesa.forecasters.path_least_squares import PathLeastSquares
from lesa.statistics.resampling import resample
from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable
from lesa.tables.times import as_times, same_times


@dataclass(frozen=True, eq=False, repr=False)
class CalibratedForecaster(Forecaster):
    """Made by :meth:`lesa.Calibration.forecasters`.

    Args:
        stream: (component, branch).
        measured: its statistics.
        schedule: the calibrated times [steps + 1].
        model: what the calibration was made for, by component.
        path: weight of the accumulated errors, as in :class:`lesa.PathLeastSquares`.
        history: how many of the latest full features a prediction may use; None: all.
    """

    stream: Stream
    measured: Measured
    schedule: Tensor
    model: Mapping[str, str]
    path: float = 1.0
    history: int | None = None

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        times = as_times(times, plan.num_steps)
        if plan.start and not same_times(times, self.schedule):  # the rest of the schedule may be the calibrated one
            made = self.table(plan.within(plan.start, plan.num_steps - plan.start), times[plan.start :])
            return CoefficientTable(plan, times, made.coefficients, made.bias)
        errors = self.measured.errors_at(times, self.schedule)
        return PathLeastSquares(errors, path=self.path, history=self.history).table(plan, times)

    @property
    def state(self) -> Hashable:
        return self.measured.state

    def check_model(self, model: Mapping[str, str]) -> None:
        for component, kind in self.model.items():
            if model.get(component) != kind:
                raise ValueError(
                    f"this calibration was made for {component} {kind}, the pipeline has {model.get(component)}; "
                    "calibrate it: lesa.calibrate(pipeline, prompts)"
                )

    def limited(self, history: int) -> "CalibratedForecaster":
        return dataclasses.replace(self, history=min(whole("history", history, least=1), self.history or history))

    def expected_error(self, table: CoefficientTable) -> Tensor | None:
        gram = self.measured.gram
        if gram.num_steps != len(self.schedule) - 1 or table.plan.start:  # known for some of its steps only
            return torch.full((table.plan.num_steps,), torch.inf, dtype=torch.float64)
        if not same_times(table.times, self.schedule):
            gram = resample(gram, self.schedule, table.times)
        return gram.relative_error(table)

    def __repr__(self) -> str:
        return f"CalibratedForecaster({'.'.join(self.stream)})"
