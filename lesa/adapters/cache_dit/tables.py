"""Tables for generations whose full steps cache-dit decides one after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.adapters.diffusers.noise_levels import noise_levels
from lesa.forecasters.base import as_forecaster
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable
from lesa.tables.times import as_times

MAX_TABLES = 256  # one for each full step of a generation, for the plans that a threshold leads to


class Tables:
    """Tables, shared by all calibrators of a configuration.

    cache-dit deep-copies configurations, and makes new calibrators for each list of blocks, branch and generation.

    Args:
        forecaster: makes the tables.
        schedule: a pipeline, whose scheduler is read when a generation begins; or its times [steps + 1]; or the number
            of steps, for a forecaster that only counts them.
        max_history: full features that a prediction may use.

    Raises:
        ValueError: if the forecaster needs times and there are none.
    """

    def __init__(
        self, forecaster: Forecaster, schedule: Any | Tensor | Sequence[float] | int, max_history: int | None = None
    ) -> None:
        forecaster = as_forecaster(forecaster)
        if isinstance(schedule, int) and forecaster.needs_times:
            raise ValueError(f"{forecaster!r} needs the times of the steps: give the pipeline, or scheduler.sigmas")
        if max_history is not None and max_history < 1:
            raise ValueError(f"max_history must be at least 1, not {max_history}")
        self.forecaster = forecaster if max_history is None else forecaster.limited(max_history)
        self.reach = self.forecaster.reach  # full features that a prediction uses; None: possibly all
        self._schedule = schedule
        self._made: dict[tuple[StepPlan, tuple[float, ...]], CoefficientTable] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tables":
        return self

    def begin(self) -> tuple[int, Tensor]:
        """The first step and the times [steps + 1] of the generation that begins.

        It is not step 0 if the generation starts part-way through its schedule, or cache-dit refreshes during it.
        """
        if isinstance(self._schedule, int):
            return 0, torch.linspace(1, 0, self._schedule + 1, dtype=torch.float64)
        scheduler = getattr(self._schedule, "scheduler", None)
        if scheduler is None:
            return 0, as_times(self._schedule, len(self._schedule) - 1)
        start = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        return start, noise_levels(scheduler)

    def table(self, full_steps: Sequence[int], times: Tensor) -> CoefficientTable:
        """The table of the steps after ``full_steps``, up to the next full step."""
        plan = StepPlan(len(times) - 1, full_steps, start=full_steps[0])
        key = (plan, tuple(times.tolist()))
        if key not in self._made:
            while len(self._made) >= MAX_TABLES:
                del self._made[next(iter(self._made))]
            self._made[key] = self.forecaster.table(plan, times)
        return self._made[key]
