"""The driver that predicts: a plan and forecasters, turned into a table for each generation."""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lesa.forecasters.base import as_forecasters, forecaster_list
from lesa.runtime.buffer_layout import BufferLayout
from lesa.runtime.driver import ONLY_SESSION, Call, Driver, Session, Warnings
from lesa.runtime.generation import Generation
from lesa.runtime.guard import Guard, GuardMonitor, Probes, make_probes
from lesa.runtime.history import FeatureHistory
from lesa.runtime.plans import MAX_TABLES, Plan, Plans, cached
from lesa.runtime.record import Record
from lesa.runtime.substep_history import SubstepHistory
from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.memory import IntervalPrediction, Memory, SubstepMemory
from lesa.tables.plan import StepPlan
from lesa.tables.substeps import Substeps
from lesa.tables.table import CoefficientTable

log = logging.getLogger("lesa")


@dataclass
class OpenGeneration:
    """The generation of one session.

    Attributes:
        identity: the same object for all calls of the generation.
        branches: the state of each stream that goes on.
        records: of all its streams.
    """

    identity: object
    branches: dict[Stream, Generation] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


class Accelerator(Driver):
    """Runs the full steps of a plan and predicts the others, for every stream of a pipeline.

    A plan and a table are made once for each schedule, not for each generation.

    Args:
        forecasters: one for all streams, or one for each (component, branch); anything with ``table(plan, times)``.
        plan: fixed, or a function of a generation's times [steps + 1] that returns one. A stream that starts part-way
            (image to image, a second transformer, guidance that begins late) uses a fixed plan from its first step on,
            which is full as well; a function is called with the remaining times.
        max_history: full features that a prediction may use; None: as many as its table needs.
        guard: compares predictions with the truth at every full step; None: no comparison.
        strict: a generation that predicts nothing although its plan has predicted steps is an error, not a warning.
        substeps: divides the steps of a schedule [steps + 1] into substeps; None: they are not divided.

    Attributes:
        records: of the generation that began last.
        warnings: all warnings so far, each once.

    Raises:
        ValueError: for what is no forecaster, or a guard with a fixed table, which has no row for its full steps.
    """

    def __init__(
        self,
        forecasters: Any,
        plan: Plan,
        max_history: int | None = None,
        guard: Guard | None = None,
        *,
        strict: bool = False,
        substeps: Callable[[Tensor], Substeps] | None = None,
    ) -> None:
        self.forecasters = as_forecasters(forecasters)
        if guard is not None and any(forecaster.only_own_plan for forecaster in forecaster_list(self.forecasters)):
            raise ValueError(
                "a table does not say what would be predicted of its full steps; a guard needs the forecaster behind it"
            )
        self.plan = plan
        self.max_history = max_history
        self.guard = guard
        self.strict = strict
        self._divide = substeps
        self.records: list[Record] = []
        self.warnings = Warnings()
        self._open: WeakKeyDictionary[Session, OpenGeneration] = WeakKeyDictionary()
        self._current: tuple[OpenGeneration, Generation] | None = None
        self._plans = Plans(plan)
        self._tables: dict[Hashable, CoefficientTable] = {}
        self._probes: dict[Hashable, Probes] = {}
        self._substeps: dict[Hashable, Substeps] = {}
        self._make_layout = functools.lru_cache(MAX_TABLES)(BufferLayout)
        self._logged: set[str] = set()

    @property
    def going_on(self) -> list[Stream]:
        """The streams whose features are kept at the moment, of all sessions."""
        return [stream for opened in self._open.values() for stream in opened.branches]

    def begin(self, call: Call) -> bool:
        opened, stream = self._opened(call), (call.component, call.branch)
        generation = opened.branches.get(stream)
        if generation is None or not generation.continues_with(call):
            generation = self._start(opened, call, generation)
        self._current = opened, generation
        return generation.begin(call)

    def keep(self, head: str, feature: Tensor) -> None:
        if self._current is not None:
            self._current[1].keep(head, feature)

    def predict(self, head: str) -> Tensor:
        assert self._current is not None, "begin comes first"
        return self._current[1].predict(head)

    def predict_interval(self, head: str) -> IntervalPrediction | None:
        assert self._current is not None, "begin comes first"
        return self._current[1].predict_interval(head)

    def mean(self, head: str) -> tuple[Tensor | None, float] | None:
        return None if self._current is None else self._current[1].mean(head)

    def divided(self, head: str) -> SubstepMemory | None:
        return None if self._current is None else self._current[1].divided(head)

    def end(self, *, failed: bool) -> None:
        current, self._current = self._current, None
        if current is None:
            if failed:
                for opened in self._open.values():
                    self._drop(opened, list(opened.branches))
            return
        opened, generation = current
        if failed:
            self._drop(opened, list(opened.branches))
            return
        generation.end()
        if generation.is_over:
            self._finish(opened, _finished_with(opened, generation))

    def reset(self, session: Session | None = None) -> None:
        self._current = None
        for opened in [opened for key, opened in self._open.items() if session in (None, key)]:
            self._finish(opened, list(opened.branches))

    def check_shared_tokens(self) -> None:
        """Refuse extra full steps: each process would decide by the errors of its own tokens."""
        if self.guard is not None and self.guard.extra_steps:
            raise ValueError(
                "under context parallelism each process sees the errors of its own tokens, and one that runs an extra "
                "full step would wait for the others; give lesa.Guard(extra_steps=0)"
            )

    def _opened(self, call: Call) -> OpenGeneration:
        """The generation that a call belongs to; a new one ends the one before it of the same session."""
        opened = self._open.get(call.session)
        if opened is None or opened.identity is not call.generation:
            if opened is not None:
                self._finish(opened, list(opened.branches))
            opened = self._open[call.session] = OpenGeneration(call.generation)
            self.records = opened.records
        return opened

    def _start(self, opened: OpenGeneration, call: Call, before: Generation | None) -> Generation:
        """The state of a stream that begins with ``call``, where its state so far was ``before``."""
        stream = (call.component, call.branch)
        if before is not None:
            if before.last_step == call.step:
                self._complain(
                    f"{call.component} ({call.branch}) was called again at step {call.step}, where nothing can be "
                    "predicted: its scheduler did not advance, or one branch makes several calls per step"
                )
            self._finish(opened, [stream])
        generation = opened.branches[stream] = self._make(call)
        opened.records.append(generation.record)
        return generation

    def _finish(self, opened: OpenGeneration, streams: list[Stream]) -> None:
        """Free the features of some streams; warn if one of them had no prediction at all."""
        complaints = [opened.branches[stream].complaint for stream in streams]
        self._drop(opened, streams)
        for complaint in filter(None, complaints):
            self._complain(complaint)

    def _drop(self, opened: OpenGeneration, streams: list[Stream]) -> None:
        for stream in streams:
            opened.branches.pop(stream).close()

    def _complain(self, what: str) -> None:
        if self.strict:
            raise RuntimeError(what)
        self.warnings(what)

    def _make(self, call: Call) -> Generation:
        plan, times, forecaster = self._plans.of(call), call.times, self._forecaster(call)
        if times is None:
            if forecaster.needs_times:
                raise ValueError(f"{forecaster!r} needs the times of the steps: enable(..., times=scheduler.sigmas)")
            times = torch.linspace(1, 0, plan.num_steps + 1, dtype=torch.float64)  # any will do
        where = f"{call.component} ({call.branch})"
        monitor = None if self.guard is None else GuardMonitor(self.guard, where, self.warnings)
        note = getattr(self.plan, "note", lambda plan: "")(plan)
        if note and note not in self._logged:
            self._logged.add(note)
            log.warning("%s: %s", where, note)
        if self._divide is not None and call.indivisible and not plan.predicted_steps:
            self.warnings(
                f"{where}: all {plan.num_steps} steps run in full and nothing is predicted, since they cannot be "
                f"divided into substeps: {call.indivisible}; sample with more steps, such as 100, of which as many run"
            )
        call = call._replace(session=ONLY_SESSION, head=None)  # the generation must not keep these two alive
        generation = Generation(call, plan, functools.partial(self._memory, call, forecaster, times, monitor), monitor)
        generation.record.note = note
        return generation

    def _memory(
        self,
        call: Call,
        forecaster: Forecaster,
        times: Tensor,
        monitor: GuardMonitor | None,
        plan: StepPlan,
        previous: Memory | None,
    ) -> Memory:
        """The memory of one head under a plan, which takes over the features of ``previous``."""
        own = forecaster.make_memory(plan, times, previous)
        if own is not None:
            return own
        fine = None
        if self._divide is not None and call.times is not None and not call.indivisible:
            fine = cached(self._substeps, tuple(times.tolist()), functools.partial(self._divide, times))
        if fine is None or fine.first[-1] == plan.num_steps:  # each step would be divided into one part
            return self._history(call, forecaster, times, monitor, plan, previous)
        held = previous.history if isinstance(previous, SubstepHistory) else None
        history = self._history(call, forecaster, fine.times, monitor, fine.plan(plan), held)
        if monitor is not None:
            known, first = monitor.expected, fine.first
            monitor.expected = {step: known[first[step]] for step in plan.full_steps if first[step] in known}
        return SubstepHistory(history, fine, plan, forecaster.correction, forecaster.output_share)

    def _history(
        self,
        call: Call,
        forecaster: Forecaster,
        times: Tensor,
        monitor: GuardMonitor | None,
        plan: StepPlan,
        previous: Memory | None,
    ) -> FeatureHistory:
        """The features that the table of a plan uses."""
        key = (call.component, call.branch, plan, tuple(times.tolist()), forecaster.state)
        table = cached(self._tables, key, lambda: forecaster.table(plan, times))
        if self.guard is None or monitor is None:
            return FeatureHistory(table, centre=call.layer_norm, make_layout=self._make_layout)
        assert previous is None or isinstance(previous, FeatureHistory)
        expected = self.guard.expected_error(forecaster, (call.component, call.branch), plan)
        probes = cached(
            self._probes, key, lambda: make_probes(lambda other: forecaster.table(other, times), plan, expected)
        )
        monitor.expected = probes.expected
        spare = self.guard.extra_steps
        return FeatureHistory(table, probes, spare=spare, previous=previous, make_layout=self._make_layout)

    def _forecaster(self, call: Call) -> Forecaster:
        forecaster = self.forecasters
        if isinstance(forecaster, Mapping):
            stream = (call.component, call.branch)
            if stream not in forecaster:
                raise ValueError(f"no forecaster for {stream}; there are forecasters for {sorted(forecaster)}")
            forecaster = forecaster[stream]
        return forecaster if self.max_history is None else forecaster.limited(self.max_history)


def _finished_with(opened: OpenGeneration, last: Generation) -> list[Stream]:
    """The stream that is at its end, and those that no longer take part: the first of two transformers, a branch whose
    guidance ended early.
    """
    return [s for s, g in opened.branches.items() if g is last or g.last_step < last.last_step - 1]
