"""The state of one image or video in one branch of one transformer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lesa.plan import StepPlan
from lesa.runtime.driver import Call, Coming
from lesa.runtime.guard import Watch
from lesa.runtime.history import Memory
from lesa.runtime.stopwatch import KINDS, Kind, Stopwatch

log = logging.getLogger("lesa")

# Makes what remembers the features of one head under a plan; the second argument is what did so under another one.
MakeMemory = Callable[[StepPlan, Memory | None], Memory]
NOTHING_KEPT = "its blocks never handed a feature to the head"


@dataclass
class Record:
    """What became of a generation, for the summary.

    Attributes:
        component, branch: whose.
        full, predicted: its steps.
        unplanned: the full ones that were to be predicted, with the reason.
        kept_bytes: the largest size of its features.
        stopwatch: what a step of each kind took.
        watch: how far predictions were off, if somebody compared them.
        note: what its plan could not keep of what was asked for; empty: nothing.
    """

    component: str
    branch: str
    full: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    unplanned: dict[int, str] = field(default_factory=dict)
    kept_bytes: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    watch: Watch | None = None
    note: str = ""

    def __str__(self) -> str:
        steps = len(self.full) + len(self.predicted)
        full, predicted = (_duration(self.stopwatch.seconds(kind)) for kind in KINDS)
        line = (
            f"{self.component} ({self.branch}): {len(self.full)} full and {len(self.predicted)} predicted steps, "
            f"{steps / max(1, len(self.full)):.2f}x ideal, {self.kept_bytes / 2**20:.1f} MiB kept; "
            f"full: {', '.join(map(str, self.full))} ({full} each); "
            f"predicted: {', '.join(map(str, self.predicted)) or 'none'} ({predicted} each)"
        )
        for reason in dict.fromkeys(self.unplanned.values()):
            line += f"; not predicted: {', '.join(str(s) for s, r in self.unplanned.items() if r == reason)} ({reason})"
        return line + (f"; {self.note}" if self.note else "")


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"


class Generation:
    """Follows one branch from its first step to its last.

    Args:
        call: the first call.
        plan: which of its steps are full; the first that runs is.
        make_memory: makes what remembers the features of one head.
        watch: compares predictions with the truth at full steps, and may revise the plan.
    """

    def __init__(self, call: Call, plan: StepPlan, make_memory: MakeMemory, watch: Watch | None = None) -> None:
        self.identity = call.generation
        self.record = Record(call.component, call.branch, watch=watch)
        self.last_step = -1
        self._watch = watch
        self._plan = plan
        self._make_memory = make_memory
        self._memories: dict[str, Memory] = {}
        self._signature = call.signature
        self._shapes: dict[str, torch.Size] = {}  # of the feature at each head
        self._lack = NOTHING_KEPT  # why predictions cannot be made
        self._weighed = False  # what the memories hold has been recorded
        self._kind: Kind = "full"
        self._started: object = None

    def continues_with(self, call: Call) -> bool:
        """Whether a call belongs to this generation; if not, a new one begins."""
        return call.generation is self.identity and call.step > self.last_step

    def begin(self, call: Call) -> bool:
        """Whether this step is predicted. A step whose prediction cannot be made runs in full."""
        step = self.last_step = call.step
        self._started = self.record.stopwatch.start()
        planned = self._plan.is_full(step)
        if call.must_run:
            self._begin_anew(step, call.must_run)
        elif call.signature != self._signature:
            self._begin_anew(step, "the shapes of its inputs changed")
        self._signature = call.signature
        if self._watch is not None and self._plan.is_full(step):
            self._follow(self._watch.revised(self._plan, step))
        predicted = bool(self._memories) and all(m.can_predict(step) for m in self._memories.values())
        self._kind = "predicted" if predicted else "full"
        (self.record.predicted if predicted else self.record.full).append(step)
        if not predicted and not planned:
            self.record.unplanned[step] = self._lack
        return predicted

    def _begin_anew(self, step: int, reason: str) -> None:
        """What was kept is of no use any more: this step is full, and the plan goes on as if it were the first."""
        self._memories.clear()
        self._shapes.clear()
        self._lack = reason
        self._plan = self._plan.starting_at(step)

    def _follow(self, plan: StepPlan) -> None:
        """Go on with a revised plan."""
        if plan != self._plan:
            self._plan = plan
            self._memories = {head: self._make_memory(plan, memory) for head, memory in self._memories.items()}
            self._weighed = False

    def keep(self, head: str, feature: Tensor) -> None:
        if not self._plan.is_full(self.last_step):
            return
        if self._shapes.setdefault(head, feature.shape) != feature.shape:  # as where a cache of keys was filled before
            del self._memories[head]
            self._shapes[head] = feature.shape
            self._plan = self._plan.starting_at(self.last_step)
            self._lack = "the shape of its feature changed"
        if head not in self._memories:
            self._memories[head] = self._make_memory(self._plan, None)
            self._weighed = False
            if self._lack == NOTHING_KEPT:
                self._lack = "steps before it, whose features it is made of, did not run in this branch"
            self.record.stopwatch.on_gpu = feature.is_cuda
        memory, feature = self._memories[head], feature.detach()
        if self._watch is not None:
            figures = memory.residual(self.last_step, feature)
            if figures is not None:
                self._watch.note(self.last_step, figures)
        memory.keep(self.last_step, feature)
        if not self._weighed:
            self._weigh()

    def _weigh(self) -> None:
        """Record the size of all memories; none of them grows without a new plan."""
        self._weighed = True
        held = sum(kept.nbytes for kept in self._memories.values())
        if held > self.record.kept_bytes:
            self.record.kept_bytes = held
            log.info("%s (%s): keeps %.1f MiB of features", self.record.component, self.record.branch, held / 2**20)

    def predict(self, head: str) -> Tensor:
        return self._memories[head].predict(self.last_step)

    def coming(self, head: str) -> Coming | None:
        return self._memories[head].coming(self.last_step)

    def end(self) -> None:
        """The call that began last is over."""
        self.record.stopwatch.stop(self._kind, self._started)

    @property
    def is_over(self) -> bool:
        """Whether the last step of the plan has been begun."""
        return self.last_step == self._plan.num_steps - 1

    @property
    def complaint(self) -> str | None:
        """What to say if steps were to be predicted and none was."""
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
        if self._watch is not None:
            self._watch.read(wait=False)
