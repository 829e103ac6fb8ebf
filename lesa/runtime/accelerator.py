"""The driver that predicts: a plan and forecasters, turned into a table for each generation."""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lesa.forecasters import Forecaster
from lesa.plan import StepPlan
from lesa.predictor import LesaPredictor
from lesa.runtime.driver import ONLY, Call, Coming, Session, Stream
from lesa.runtime.generation import Generation, Record
from lesa.runtime.guard import Guard, Probes, Watch, expected_error, make_probes
from lesa.runtime.history import FeatureHistory, Memory
from lesa.runtime.layout import Layouts
from lesa.runtime.warning import Warnings
from lesa.runtime.window import FeatureWindow
from lesa.table import CoefficientTable

log = logging.getLogger("lesa")

Forecasters = Forecaster | Mapping[Stream, Forecaster]
Plan = StepPlan | Callable[[Tensor], StepPlan]

T = TypeVar("T")
MAX_TABLES = 16  # a server meets few schedules at a time; folding a LESA predictor takes milliseconds


@dataclass
class Open:
    """The generation of one session.

    Attributes:
        identity: lasts as long as the generation.
        generations: its state in each stream that goes on.
        records: of all its streams.
    """

    identity: object
    generations: dict[Stream, Generation] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


class Accelerator:
    """Runs the full steps of a plan and predicts the others, for every stream of a pipeline.

    A plan is made, and a forecaster asked for a table, once for each schedule and not for each generation.

    Args:
        forecasters: one for all streams, or one for each (component, branch).
        plan: fixed, or a function of a generation's times [steps + 1] that returns one. A stream that starts part-way
            (image to image, a second transformer, guidance that begins late) takes the part of a fixed plan from its
            first step on, which is full as well; a function is asked with the remaining times.
        max_history: full features that a prediction may look back on; None: as many as its table wants.
        guard: compares predictions with the truth at every full step; None: nobody does.
        strict: a generation that predicts nothing although its plan has predicted steps is an error, not a warning.

    Attributes:
        records: of the generation that began last.
        warnings: what was said of all generations so far, each thing once.

    Raises:
        ValueError: for a guard beside a fixed table, which says nothing of its full steps.
    """

    def __init__(
        self,
        forecasters: Forecasters,
        plan: Plan,
        max_history: int | None = None,
        guard: Guard | None = None,
        *,
        strict: bool = False,
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
        self.strict = strict
        self.records: list[Record] = []
        self.warnings = Warnings()
        self._open: WeakKeyDictionary[Session, Open] = WeakKeyDictionary()
        self._current: tuple[Open, Generation] | None = None
        self._plans: dict[Hashable, StepPlan] = {}
        self._tables: dict[Hashable, CoefficientTable] = {}
        self._probes: dict[Hashable, Probes] = {}
        self._layouts = Layouts()
        self._noted: set[str] = set()

    @property
    def going_on(self) -> list[Stream]:
        """The streams whose features are kept at the moment, of all sessions."""
        return [stream for opened in self._open.values() for stream in opened.generations]

    def begin(self, call: Call) -> bool:
        opened, stream = self._of_session(call), (call.component, call.branch)
        generation = opened.generations.get(stream)
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

    def coming(self, head: str) -> Coming | None:
        assert self._current is not None, "begin comes first"
        return self._current[1].coming(head)

    def end(self, *, failed: bool) -> None:
        current, self._current = self._current, None
        if current is None:
            if failed:
                self._drop_all()
            return
        opened, generation = current
        if failed:
            self._drop(opened, list(opened.generations))  # nothing of it is going on
            return
        generation.end()
        if generation.is_over:
            self._finish(opened, _left_by(opened, generation))

    def reset(self, session: Session | None = None) -> None:
        self._current = None
        for opened in [opened for key, opened in self._open.items() if session in (None, key)]:
            self._finish(opened, list(opened.generations))

    def _of_session(self, call: Call) -> Open:
        """The generation that a call belongs to; a new one ends the one before it of the same session."""
        opened = self._open.get(call.session)
        if opened is None or opened.identity is not call.generation:
            if opened is not None:
                self._finish(opened, list(opened.generations))
            opened = self._open[call.session] = Open(call.generation)
            self.records = opened.records
        return opened

    def _start(self, opened: Open, call: Call, before: Generation | None) -> Generation:
        """The state of a stream that begins with ``call``, where its state so far was ``before``."""
        stream = (call.component, call.branch)
        if before is not None:
            if before.last_step == call.step:
                self._complain(
                    f"{call.component} ({call.branch}) was called again at step {call.step}, where nothing can be "
                    "predicted: the scheduler of its pipeline does not go on, or one branch takes several calls a step"
                )
            self._finish(opened, [stream])
        generation = opened.generations[stream] = self._make(call)
        opened.records.append(generation.record)
        return generation

    def _finish(self, opened: Open, streams: list[Stream]) -> None:
        """Free their features; say so if one of them went by without a single prediction."""
        complaints = [opened.generations[stream].complaint for stream in streams]
        self._drop(opened, streams)
        for complaint in filter(None, complaints):
            self._complain(complaint)

    def _drop(self, opened: Open, streams: list[Stream]) -> None:
        for stream in streams:
            opened.generations.pop(stream).close()

    def _drop_all(self) -> None:
        for opened in self._open.values():
            self._drop(opened, list(opened.generations))

    def _complain(self, what: str) -> None:
        if self.strict:
            raise RuntimeError(what)
        self.warnings(what)

    def _make(self, call: Call) -> Generation:
        plan, times, forecaster = self._plan(call), call.times, self._forecaster(call)
        if times is None:
            if getattr(forecaster, "needs_times", True):
                raise ValueError(f"{forecaster!r} needs the times of the steps: enable(..., times=scheduler.sigmas)")
            times = torch.linspace(1, 0, plan.num_steps + 1, dtype=torch.float64)  # any times serve who counts steps
        where = f"{call.component} ({call.branch})"
        watch = None if self.guard is None else Watch(self.guard, where, self.warnings)
        rows = max(forecaster.config.windows) * 2 if _has_window(forecaster) else None
        if rows is None:
            table = self._table(call, forecaster, plan, times)  # what cannot be made is an error before the first step
            rows = FeatureHistory(table, layouts=self._layouts).num_rows if log.isEnabledFor(logging.INFO) else 0
        log.info("%s: %s (# full, . predicted); at most %d features are kept", where, plan, rows)
        note = getattr(self.plan, "note", lambda plan: "")(plan)
        if note and note not in self._noted:
            self._noted.add(note)
            log.warning("%s: %s", where, note)
        what = call._replace(session=ONLY, head=None)  # these would hold their own keys, and the conditions of the call
        generation = Generation(call, plan, functools.partial(self._memory, what, forecaster, times, watch), watch)
        generation.record.note = note
        return generation

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
            return FeatureWindow(forecaster, plan, times, previous)
        table = self._table(call, forecaster, plan, times)
        if self.guard is None or watch is None:
            return FeatureHistory(table, centre=call.layer_norm, layouts=self._layouts)
        assert previous is None or isinstance(previous, FeatureHistory)
        probes = self._probes_of(call, forecaster, plan, times)
        watch.expected = probes.expected
        return FeatureHistory(table, probes, spare=self.guard.extra_steps, previous=previous, layouts=self._layouts)

    def _table(self, call: Call, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> CoefficientTable:
        key = (call.component, call.branch, plan, tuple(times.tolist()), _state_of(forecaster))
        return _once(self._tables, key, lambda: self._make_table(forecaster, plan, times))

    def _probes_of(self, call: Call, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> Probes:
        def make() -> Probes:
            assert self.guard is not None
            expected = expected_error(self.guard, forecaster, (call.component, call.branch), plan)
            return make_probes(lambda other: self._make_table(forecaster, other, times), plan, expected)

        key = (call.component, call.branch, plan, tuple(times.tolist()), _state_of(forecaster))
        return _once(self._probes, key, make)

    def _make_table(self, forecaster: Forecaster, plan: StepPlan, times: Tensor) -> CoefficientTable:
        if self.max_history is None:
            return forecaster.table(plan, times)
        if hasattr(forecaster, "limited"):  # better than to leave out of a table what others were made for
            limited: Forecaster = forecaster.limited(self.max_history)
            return limited.table(plan, times)
        return forecaster.table(plan, times).limited(self.max_history)

    def _plan(self, call: Call) -> StepPlan:
        """The plan of the steps from ``call`` on, counted from step 0 of the schedule."""
        if not isinstance(self.plan, StepPlan):
            if call.times is None:
                raise ValueError("a plan that depends on the times needs them: enable(..., times=...)")
            make = functools.partial(_planned, self.plan, call.times, call.step)
            return _once(self._plans, (call.step, tuple(call.times.tolist())), make)
        steps = self.plan.num_steps if call.times is None else len(call.times) - 1
        if steps != self.plan.num_steps:
            raise ValueError(
                f"the plan is for {self.plan.num_steps} steps, this generation has {steps} (by the scheduler of the "
                "pipeline that calls the transformer, or else of the one that lesa was enabled on); give a plan for "
                f"{steps} steps, or a function: plan=lambda times: StepPlan.paper(len(times) - 1, interval=7)"
            )
        if call.step >= steps:
            raise ValueError(
                f"the plan is for {steps} steps and this generation goes on; give a plan for as many as it has"
            )
        return self.plan.starting_at(call.step) if call.step > 0 else self.plan

    def _forecaster(self, call: Call) -> Forecaster:
        if isinstance(self.forecasters, Mapping):
            stream = (call.component, call.branch)
            if stream not in self.forecasters:
                raise ValueError(f"no forecaster for {stream}; there are forecasters for {sorted(self.forecasters)}")
            return self.forecasters[stream]
        return self.forecasters


def _left_by(opened: Open, last: Generation) -> list[Stream]:
    """The stream of a generation at its end, and those that no longer take part: the first of two transformers, a
    branch whose guidance ended early.
    """
    return [s for s, g in opened.generations.items() if g is last or g.last_step < last.last_step - 1]


def _state_of(forecaster: Forecaster) -> Hashable:
    """What a table follows from beside the plan and the times, where that may change: weights, inner products."""
    if isinstance(forecaster, nn.Module):
        return tuple((id(p), p._version) for p in forecaster.parameters() if not p.is_inference())
    return getattr(forecaster, "state", None)


def _has_window(forecaster: Forecaster) -> TypeGuard[LesaPredictor]:
    """Whether this is a predictor without a table, whose predictions are its own past."""
    return isinstance(forecaster, LesaPredictor) and forecaster.config.latent == "kan"


def _planned(plan: Callable[[Tensor], StepPlan], times: Tensor, start: int) -> StepPlan:
    """What a function makes of the times from ``start`` on."""
    rest, steps = plan(times[start:]), len(times) - 1 - start
    if not isinstance(rest, StepPlan) or rest.num_steps != steps:
        raise ValueError(f"the function plan= was asked for a StepPlan of {steps} steps and returned {rest!r}")
    return StepPlan(start + steps, (start + step for step in rest.full_steps), start=start)


def _once(made: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives for a key; the latest few are remembered."""
    if key not in made:
        while len(made) >= MAX_TABLES:
            del made[next(iter(made))]
        made[key] = make()
    return made[key]
