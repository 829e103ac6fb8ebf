"""The state of one image or video in one branch of one transformer."""

import warnings
from dataclasses import dataclass, field

from torch import Tensor

from lesa.runtime.driver import Call
from lesa.runtime.history import FeatureHistory
from lesa.table import CoefficientTable


class LesaWarning(UserWarning):
    """Something runs, but not as fast as was asked for."""


@dataclass
class Record:
    """What became of a generation, for the summary."""

    component: str
    branch: str
    full: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    kept_bytes: int = 0


class Generation:
    """Follows one branch from its first step to its last.

    Args:
        call: the first call.
        table: the coefficients of this plan on this schedule; None: every step runs in full.
    """

    def __init__(self, call: Call, table: CoefficientTable | None) -> None:
        self.identity = call.generation
        self.record = Record(call.component, call.branch)
        self._table = table
        self._histories: dict[str, FeatureHistory] = {}
        self._signature = call.signature
        self._last_step = -1

    def continues_with(self, call: Call) -> bool:
        """Whether a call belongs to this generation; if not, a new one begins."""
        return call.generation is self.identity and call.step > self._last_step

    def begin(self, call: Call) -> bool:
        """Whether this step is predicted. A step whose prediction cannot be made runs in full."""
        self._last_step = call.step
        if call.signature != self._signature:
            # A callback changed the batch or the resolution: what was kept no longer fits.
            self._signature = call.signature
            self._histories.clear()
        predicted = bool(self._histories) and all(h.can_predict(call.step) for h in self._histories.values())
        (self.record.predicted if predicted else self.record.full).append(call.step)
        return predicted

    def keep(self, head: str, feature: Tensor) -> None:
        if self._table is None or not self._table.plan.is_full(self._last_step):
            return
        if head not in self._histories:
            self._histories[head] = FeatureHistory(self._table)
        self._histories[head].keep(self._last_step, feature.detach())
        self.record.kept_bytes = sum(history.nbytes for history in self._histories.values())

    def predict(self, head: str) -> Tensor:
        return self._histories[head].predict(self._last_step)

    @property
    def is_over(self) -> bool:
        """Whether the last step of the plan has been begun."""
        return self._table is not None and self._last_step == self._table.plan.num_steps - 1

    def close(self) -> None:
        """Free the kept features; say so if a whole generation went by without a single prediction."""
        self._histories.clear()
        planned = 0 if self._table is None else len(self._table.plan.predicted_steps)
        if self.is_over and planned and not self.record.predicted:
            warnings.warn(
                f"no step of {self.record.component} ({self.record.branch}) was predicted although the plan has "
                f"{planned} predicted steps: the shapes of its inputs changed during the generation, or its blocks "
                "never handed a feature to the head",
                LesaWarning,
                stacklevel=2,
            )
