"""What a generation did: its steps, the bytes it kept, and how long steps took, without waiting for a GPU."""

import time
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal

import torch

from lesa.runtime.guard import GuardMonitor

Kind = Literal["full", "predicted"]
KINDS: tuple[Kind, Kind] = ("full", "predicted")


class Stopwatch:
    """Times steps of two kinds: on the host by its clock, on a GPU between two events, which are read on request."""

    def __init__(self) -> None:
        self.on_gpu = False
        self._laps: dict[Kind, list[tuple[Any, Any]]] = {"full": [], "predicted": []}

    def start(self) -> Any:
        """What :meth:`stop` takes."""
        if not self.on_gpu or torch.cuda.is_current_stream_capturing():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, kind: Kind, started: Any) -> None:
        """A step of this kind is over; a step that began on the other clock is not counted."""
        if self.on_gpu != isinstance(started, float):
            self._laps[kind].append((started, self.start()))

    def seconds(self, kind: Kind) -> float | None:
        """The mean time of a step of one kind, without the very first step, which warms up, if there are others."""
        laps = self._laps[kind]
        laps = laps[1:] if kind == "full" and len(laps) > 1 else laps
        return mean(_between(a, b) for a, b in laps) if laps else None


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@dataclass
class Record:
    """What one branch of one generation did.

    Attributes:
        component, branch: which branch.
        full, predicted: its steps.
        unplanned: the full steps that the plan had as predicted, with the reason.
        kept_bytes: the largest size of its features.
        stopwatch: the time of a step of each kind.
        monitor: the errors of its predictions, if there is a guard.
        substeps: times at which its output is computed or predicted, if its steps are divided; 0: they are not.
        note: what its plan could not keep of the budget that was asked for; empty: nothing.
    """

    component: str
    branch: str
    full: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    unplanned: dict[int, str] = field(default_factory=dict)
    kept_bytes: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    monitor: GuardMonitor | None = None
    substeps: int = 0
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
        if self.substeps:
            line += f"; every output is the mean over its step, {self.substeps} substeps in all"
        return line + (f"; {self.note}" if self.note else "")


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"
