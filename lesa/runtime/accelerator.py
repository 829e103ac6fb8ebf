"""The driver that predicts: a plan and forecasters, turned into a table for each generation."""

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from lesa.forecasters import Forecaster
from lesa.plan import StepPlan
from lesa.predictor import LesaPredictor
from lesa.runtime.driver import Call, Coming, Stream
from lesa.runtime.generation import Generation, Record
from lesa.runtime.guard import Guard, Probes, Watch, expected_error, make_probes
from lesa.runtime.history import FeatureHistory, Memory
from lesa.runtime.warning import LesaWarning
from lesa.runtime.window import FeatureWindow
from lesa.table import CoefficientTable

Forecasters = Forecaster | Mapping[Stream, Forecaster]
Plan = StepPlan | Callable[[Tensor], StepPlan]

T = TypeVar("T")
MAX_TABLES = 16  # a server meets few schedules at a time; folding a LESA predictor takes milliseconds


class Accelerator:
    """Runs the full steps of a plan and predicts the others, for every stream of a pipeline.

    A forecaster is asked for a table once for each schedule, not for each generation.

    Args:
        forecasters: one for all streams, or one for each (component, branch).
        plan: fixed, or a function of a generation's times [steps + 1] that returns one.
        max_history: full features that a prediction may look back on; None: as many as its table wants.
        guard: compares predictions with the truth at every full step; None: nobody does.

    Raises:
        ValueError: for a guard beside a fixed table, which says nothing of its full steps.
    """

    def __init__(
        self, forecasters: Forecasters, plan: Plan, max_history: int | None = None, guard: Guard | None = None
    ) -> None:
        every = forecasters.values() if isinstance(forecasters, Mapping) else [forecasters]
        if guard is not None and any(isinstance(forecaster, CoefficientTable) for forecaster in every):
            raise ValueError(
                "a table does not say what would be predicted of its full steps; a guard needs the forecaster behind it"
            )
        self.forecasters = forecasters
        self.plan = plan
        self.max_history = max_history
        self.guard = guard
        self.records: list[Record] = []  # of the latest generation
        self._generations: dict[Stream, Generation] = {}
        self._current: Generation | None = None
        self._tables: dict[Hashable, CoefficientTable] = {}
        self._probes: dict[Hashable, Probes] = {}

    def begin(self, call: Call) -> bool:
        stream = (call.component, call.branch)
        generation = self._generations.get(stream)
        if generation is None or not generation.continues_with(call):
            if generation is not None:
                generation.close()
            if not any(g.identity is call.generation for g in self._generations.values()):
                self.records = []
            generation = self._generations[stream] = self._start(call)
            self.records.append(generation.record)
        self._current = generation
        return generation.begin(call)

    def keep(self, head: str, feature: Tensor) -> None:
        if self._current is not None:
            self._current.keep(head, feature)

    def predict(self, head: str) -> Tensor:
        assert self._current is not None, "begin comes first"
        return self._current.predict(head)

    def coming(self, head: str) -> Coming | None:
        assert self._current is not None, "begin comes first"
        return self._current.coming(head)

    def end(self, *, failed: bool) -> None:
        current, self._current = self._current, None
        if current is not None and (failed or current.is_over):
            current.close()
            del self._generations[current.record.component, current.record.branch]

    def reset(self) -> None:
        for generation in self._generations.values():
            generation.close()
        self._generations.clear()
        self._current = None

    def _start(self, call: Call) -> Generation:
        """The generation that begins with ``call``."""
        plan, times, forecaster = self._plan(call), call.times, self._forecaster(call)
        if call.step > 0:
            warnings.warn(
                f"{call.component} ({call.branch}) starts at step {call.step} of {plan.num_steps}, where this plan "
                "knows no earlier features; this generation runs in full",
                LesaWarning,
                stacklevel=2,
            )
            return Generation(call, plan, None)
        if times is None:
            if getattr(forecaster, "needs_times", True):
                raise ValueError(f"{forecaster!r} needs the times of the steps: enable(..., times=scheduler.sigmas)")
            times = torch.linspace(1, 0, plan.num_steps + 1, dtype=torch.float64)  # any times serve who counts steps
        watch = None if self.guard is None else Watch(self.guard, f"{call.component} ({call.branch})")
        if not _has_window(forecaster):
            self._table(call, forecaster, plan, times)  # one that cannot be made is an error before the first step
        return Generation(call, plan, functools.partial(self._memory, call, forecaster, times, watch), watch)

    def _memory(
        self,
        call: Call,
        forecaster: Forecaster,
        times: Tensor,
        watch: Watch | None,
        plan: StepPlan,
        previous: Memory | None,
    ) -> Memory:
        """What remembers the features of one head under a plan, and goes on where ``previous`` was under another."""
        if _has_window(forecaster):
            assert previous is None or isinstance(previous, FeatureWindow)
            expected = expected_error(forecaster, None, 0)
            if watch is not None and expected is not None:
                watch.expected = dict.fromkeys(plan.full_steps, expected)
            return FeatureWindow(forecaster, plan, times, previous)
        table = self._table(call, forecaster, plan, times)
        if self.guard is None or watch is None:
            return FeatureHistory(table)
        assert previous is None or isinstance(previous, FeatureHistory)
        probes = self._probes_of(call, forecaster, plan, times)
        watch.expected = probes.expected
        return FeatureHistory(table, probes, spare=self.guard.extra_steps, previous=previous)

    def _table(self, call: Call, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> CoefficientTable:
        return self._once(self._tables, call, plan, times, lambda: self._make_table(forecaster, plan, times))

    def _probes_of(self, call: Call, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> Probes:
        def make() -> Probes:
            return make_probes(lambda other: self._make_table(forecaster, other, times), forecaster, plan)

        return self._once(self._probes, call, plan, times, make)

    def _make_table(self, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> CoefficientTable:
        table = forecaster.table(plan, times)
        return table if self.max_history is None else table.limited(self.max_history)

    def _once(self, made: dict[Hashable, T], call: Call, plan: StepPlan, times: Tensor, make: Callable[[], T]) -> T:
        """What ``make`` gives for a branch, plan and schedule; the latest of them are remembered."""
        key = (call.component, call.branch, plan, tuple(times.tolist()))
        if key not in made:
            while len(made) >= MAX_TABLES:
                del made[next(iter(made))]
            made[key] = make()
        return made[key]

    def _plan(self, call: Call) -> StepPlan:
        if not isinstance(self.plan, StepPlan):
            if call.times is None:
                raise ValueError("a plan that depends on the times needs them: enable(..., times=...)")
            return self.plan(call.times)
        steps = self.plan.num_steps if call.times is None else len(call.times) - 1
        if steps != self.plan.num_steps:
            raise ValueError(
                f"the plan is for {self.plan.num_steps} steps, this generation has {steps}; give a plan for {steps} "
                "steps, or a function of the times: plan=lambda times: StepPlan.paper(len(times) - 1, interval=7)"
            )
        return self.plan

    def _forecaster(self, call: Call) -> Forecaster:
        if isinstance(self.forecasters, Mapping):
            stream = (call.component, call.branch)
            if stream not in self.forecasters:
                raise ValueError(f"no forecaster for {stream}; there are forecasters for {sorted(self.forecasters)}")
            return self.forecasters[stream]
        return self.forecasters


def _has_window(forecaster: Forecaster) -> TypeGuard[LesaPredictor]:
    """Whether this is a predictor without a table, whose predictions are its own past."""
    return isinstance(forecaster, LesaPredictor) and forecaster.config.latent == "kan"
