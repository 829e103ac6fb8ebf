"""The state of one image or video in one branch of one transformer."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lesa.plan import StepPlan
from lesa.runtime.driver import Call, Coming
from lesa.runtime.guard import Watch
from lesa.runtime.history import Memory
from lesa.runtime.warning import LesaWarning

# Makes what remembers the features of one head under a plan; the second argument is what did so under another one.
MakeMemory = Callable[[StepPlan, Memory | None], Memory]


@dataclass
class Record:
    """What became of a generation, for the summary."""

    component: str
    branch: str
    full: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    kept_bytes: int = 0
    watch: Watch | None = None


class Generation:
    """Follows one branch from its first step to its last.

    Args:
        call: the first call.
        plan: which of its steps are full.
        make_memory: makes what remembers the features of one head; None: every step runs in full.
        watch: compares predictions with the truth at full steps, and may revise the plan.
    """

    def __init__(self, call: Call, plan: StepPlan, make_memory: MakeMemory | None, watch: Watch | None = None) -> None:
        self.identity = call.generation
        self.record = Record(call.component, call.branch, watch=watch)
        self._watch = watch
        self._plan = plan
        self._make_memory = make_memory
        self._memories: dict[str, Memory] = {}
        self._signature = call.signature
        self._last_step = -1

    def continues_with(self, call: Call) -> bool:
        """Whether a call belongs to this generation; if not, a new one begins."""
        return call.generation is self.identity and call.step > self._last_step

    def begin(self, call: Call) -> bool:
        """Whether this step is predicted. A step whose prediction cannot be made runs in full."""
        self._last_step = call.step
        if call.signature != self._signature or call.must_run:
            # A callback changed the batch, the resolution or the prompt: what was kept no longer fits.
            self._signature = call.signature
            self._memories.clear()
        if self._watch is not None and self._plan.is_full(call.step):
            self._follow(self._watch.revised(self._plan, call.step))
        predicted = bool(self._memories) and all(m.can_predict(call.step) for m in self._memories.values())
        (self.record.predicted if predicted else self.record.full).append(call.step)
        return predicted

    def _follow(self, plan: StepPlan) -> None:
        """Go on with a revised plan."""
        if plan != self._plan and self._make_memory is not None:
            self._plan = plan
            self._memories = {head: self._make_memory(plan, memory) for head, memory in self._memories.items()}

    def keep(self, head: str, feature: Tensor) -> None:
        if self._make_memory is None or not self._plan.is_full(self._last_step):
            return
        if head not in self._memories:
            self._memories[head] = self._make_memory(self._plan, None)
        memory, feature = self._memories[head], feature.detach()
        if self._watch is not None:
            figures = memory.residual(self._last_step, feature)
            if figures is not None:
                self._watch.note(self._last_step, figures)
        memory.keep(self._last_step, feature)
        self.record.kept_bytes = sum(memory.nbytes for memory in self._memories.values())

    def predict(self, head: str) -> Tensor:
        return self._memories[head].predict(self._last_step)

    def coming(self, head: str) -> Coming | None:
        return self._memories[head].coming(self._last_step)

    @property
    def is_over(self) -> bool:
        """Whether the last step of the plan has been begun."""
        return self._last_step == self._plan.num_steps - 1

    def close(self) -> None:
        """Free the kept features; say so if a whole generation went by without a single prediction."""
        self._memories.clear()
        if self._watch is not None:
            self._watch.read(wait=False)
        planned = len(self._plan.predicted_steps)
        if self._make_memory is not None and self.is_over and planned and not self.record.predicted:
            warnings.warn(
                f"no step of {self.record.component} ({self.record.branch}) was predicted although the plan has "
                f"{planned} predicted steps: the shapes of its inputs changed during the generation, or its blocks "
                "never handed a feature to the head",
                LesaWarning,
                stacklevel=2,
            )
