"""How long steps take, without waiting for a GPU."""

import time
from statistics import mean
from typing import Any, Literal

import torch

Kind = Literal["full", "predicted"]
KINDS: tuple[Kind, Kind] = ("full", "predicted")


class Stopwatch:
    """Laps of two kinds. On the host by its clock; on a GPU between two events, which are read when somebody asks."""

    def __init__(self) -> None:
        self.on_gpu = False
        self._laps: dict[Kind, list[tuple[Any, Any]]] = {"full": [], "predicted": []}

    def start(self) -> Any:
        """What :meth:`stop` is to be given."""
        if not self.on_gpu or torch.cuda.is_current_stream_capturing():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, kind: Kind, started: Any) -> None:
        """A step of this kind is over; one that began on another clock is not counted."""
        if self.on_gpu != isinstance(started, float):
            self._laps[kind].append((started, self.start()))

    def seconds(self, kind: Kind) -> float | None:
        """The mean time of a step of one kind; the very first step, which warms up, counts only if it is alone."""
        laps = self._laps[kind]
        laps = laps[1:] if kind == "full" and len(laps) > 1 else laps
        return mean(_between(a, b) for a, b in laps) if laps else None


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
