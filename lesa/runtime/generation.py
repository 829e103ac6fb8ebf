"""The state of one branch of one generation: its plan, its kept features, its record."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lesa.runtime.driver import Call
from lesa.runtime.guard import GuardMonitor
from lesa.runtime.record import Kind, Record
from lesa.tables.memory import IntervalPrediction, Memory, SubstepMemory
from lesa.tables.plan import StepPlan

log = logging.getLogger("lesa")

MakeMemory = Callable[[StepPlan, Memory | None], Memory]  # (plan, the memory under an earlier plan) -> memory
NOTHING_KEPT = "no feature reached its head"


class Generation:
    """Follows one branch from its first step to its last.

    Args:
        call: the first call.
        plan: which of its steps are full; the first that runs is.
        make_memory: makes the memory of one head. It is called at once, so that a table that cannot be made is an
            error before the first step.
        monitor: compares predictions with the truth at full steps, and may revise the plan.
    """

    def __init__(
        self, call: Call, plan: StepPlan, make_memory: MakeMemory, monitor: GuardMonitor | None = None
    ) -> None:
        self.identity = call.generation
        self.record = Record(call.component, call.branch, monitor=monitor)
        self.last_step = -1
        self._monitor = monitor
        self._plan = plan
        self._make_memory = make_memory
        self._first_memory: Memory | None = make_memory(plan, None)
        if isinstance(self._first_memory, SubstepMemory):
            self.record.substeps = self._first_memory.substeps.first[-1]
        self._memories: dict[str, Memory] = {}
        self._signature = call.signature
        self._shapes: dict[str, torch.Size] = {}  # of the feature at each head
        self._reason_not_predicted = NOTHING_KEPT
        self._size_recorded = False
        self._kind: Kind = "full"
        self._started: object = None
        log.info(
            "%s (%s): %s (# full, . predicted); at most %d features are kept",
            *(call.component, call.branch, plan, self._first_memory.num_rows),
        )

    def continues_with(self, call: Call) -> bool:
        """Whether a call belongs to this generation; if not, a new one begins."""
        return call.generation is self.identity and call.step > self.last_step

    def begin(self, call: Call) -> bool:
        """Whether this step is predicted. A step whose prediction cannot be made runs in full."""
        step = self.last_step = call.step
        self._started = self.record.stopwatch.start()
        planned = self._plan.is_full(step)
        if call.must_run:
            self._start_again(step, call.must_run)
        elif call.signature != self._signature:
            self._start_again(step, "the shapes of its inputs changed")
        self._signature = call.signature
        if self._monitor is not None and self._plan.is_full(step):
            self._follow(self._monitor.revised(self._plan, step))
        predicted = bool(self._memories) and all(m.can_predict(step) for m in self._memories.values())
        self._kind = "predicted" if predicted else "full"
        (self.record.predicted if predicted else self.record.full).append(step)
        if not predicted and not planned:
            self.record.unplanned[step] = self._reason_not_predicted
        return predicted

    def _start_again(self, step: int, reason: str) -> None:
        """Drop the kept features, which are invalid now: this step is full, and the plan goes on from it."""
        self._memories.clear()
        self._shapes.clear()
        self._reason_not_predicted = reason
        self._use_plan(self._plan.starting_at(step))

    def _use_plan(self, plan: StepPlan) -> None:
        self._plan, self._first_memory = plan, None

    def _follow(self, plan: StepPlan) -> None:
        """Go on with a revised plan, with the features that are kept."""
        if plan != self._plan:
            self._use_plan(plan)
            self._memories = {head: self._make_memory(plan, memory) for head, memory in self._memories.items()}
            self._size_recorded = False

    def keep(self, head: str, feature: Tensor) -> None:
        if not self._plan.is_full(self.last_step):
            return
        if self._shapes.setdefault(head, feature.shape) != feature.shape:  # such as a call that filled a cache of keys
            del self._memories[head]
            self._shapes[head] = feature.shape
            self._use_plan(self._plan.starting_at(self.last_step))
            self._reason_not_predicted = "the shape of its feature changed"
        if head not in self._memories:
            self._memories[head] = self._first_memory or self._make_memory(self._plan, None)
            self._first_memory = None
            self._size_recorded = False
            if self._reason_not_predicted == NOTHING_KEPT:
                self._reason_not_predicted = "steps before it, whose features it is made of, did not run in this branch"
            self.record.stopwatch.on_gpu = feature.is_cuda
        memory, feature = self._memories[head], feature.detach()
        if self._monitor is not None:
            error = memory.prediction_error(self.last_step, feature)
            if error is not None:
                self._monitor.note(self.last_step, error)
        memory.keep(self.last_step, feature)
        if not self._size_recorded:
            self._record_size()

    def _record_size(self) -> None:
        """Record the size of all memories; it does not grow under the same plan."""
        self._size_recorded = True
        held = sum(kept.nbytes for kept in self._memories.values())
        if held > self.record.kept_bytes:
            self.record.kept_bytes = held
            log.info("%s (%s): keeps %.1f MiB of features", self.record.component, self.record.branch, held / 2**20)

    def predict(self, head: str) -> Tensor:
        return self._memories[head].predict(self.last_step)

    def predict_interval(self, head: str) -> IntervalPrediction | None:
        return self._memories[head].predict_interval(self.last_step)

    def _any_memory(self, head: str) -> Memory:
        """The memory of a head, or the one that it will get."""
        memory = self._memories.get(head)
        if memory is None:
            memory = self._first_memory = self._first_memory or self._make_memory(self._plan, None)
        return memory

    def mean(self, head: str) -> tuple[Tensor | None, float] | None:
        memory = self.divided(head)
        return None if memory is None else memory.mean(self.last_step)

    def divided(self, head: str) -> SubstepMemory | None:
        memory = self._any_memory(head)
        return memory if isinstance(memory, SubstepMemory) else None

    def end(self) -> None:
        """The call that began last is over."""
        self.record.stopwatch.stop(self._kind, self._started)

    @property
    def is_over(self) -> bool:
        """Whether the last step of the plan has begun."""
        return self.last_step == self._plan.num_steps - 1

    @property
    def complaint(self) -> str | None:
        """The warning if the plan had predicted steps and none was predicted."""
        missed = self.record.unplanned
        if self.record.predicted or not missed:
            return None
        reasons = ", or ".join(dict.fromkeys(missed.values()))
        return (
            f"no step of {self.record.component} ({self.record.branch}) was predicted although {len(missed)} of the "
            f"{len(self.record.full)} steps that ran were to be: {reasons}"
        )

    def close(self) -> None:
        """Free the kept features."""
        self._memories.clear()
        self._first_memory = None
        if self._monitor is not None:
            self._monitor.read(wait=False)
