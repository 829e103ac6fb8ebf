"""Two clocks: what a call takes of the device, and what its caller waits for.

    device   CUDA events around calls that were queued behind a backlog, so that the host is never waited for
    wall     a counter of the host around calls and a synchronisation

Event pairs on an idle stream measure the host's gaps instead, for everything below some 100 us. On a CPU both clocks
are one.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

MOST_QUEUED = 20  # calls behind one backlog; a stream takes about a thousand launches before the host has to wait
BACKLOG_CYCLES_PER_SECOND = 2.0e9  # of an SM, about
LONGEST_BACKLOG = 0.05  # seconds


class Clock(Protocol):
    """``start()``, the calls, then ``stop()`` gives the seconds in between."""

    def start(self) -> None: ...

    def stop(self) -> float: ...


class WallClock:
    """What the caller waits for, with the device idle before and after."""

    def __init__(self, device: str) -> None:
        self._synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._began = 0.0

    def start(self) -> None:
        self._synchronize()
        self._began = time.perf_counter()

    def stop(self) -> float:
        self._synchronize()
        return time.perf_counter() - self._began


class DeviceClock:
    """What the device works, between two events behind a backlog of ``backlog`` seconds."""

    def __init__(self, backlog: float, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._cycles = int(min(backlog, LONGEST_BACKLOG) * BACKLOG_CYCLES_PER_SECOND)
        self._events = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._cuda.synchronize()
        self._cuda._sleep(self._cycles)
        self._events[0].record()

    def stop(self) -> float:
        first, last = self._events
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Timer:
    """A clock as pytest-benchmark wants one: a function that is called before the calls and after them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running = False

    def __call__(self) -> float:
        self._running = not self._running
        if self._running:
            self._clock.start()
            return 0.0
        return self._clock.stop()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over rounds, and the fifths at both ends."""

    median: float
    low: float
    high: float
    rounds: int

    def as_json(self, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


def one_round(call: Callable[[], Any], clock: Clock, iterations: int) -> float:
    """Seconds of a call, the mean of ``iterations``."""
    clock.start()
    for _ in range(iterations):
        call()
    return clock.stop() / iterations


def make_clock(call: Callable[[], Any], kind: str, device: str) -> tuple[Clock, int, float]:
    """The clock ``kind`` for this call, how many calls a round should have, and about how long a call takes."""
    wall = WallClock(device)
    one_round(call, wall, 1)
    estimate = max(1e-7, one_round(call, wall, 1))
    if estimate < 0.02:
        estimate = min(estimate, *(max(1e-7, one_round(call, wall, 1)) for _ in range(2)))
    iterations = max(1, min(MOST_QUEUED, int(2e-3 / estimate)))
    if kind == "wall" or device != "cuda":
        return wall, iterations, estimate
    return DeviceClock(1.5 * iterations * estimate), iterations, estimate


def measure(call: Callable[[], Any], kind: str, device: str, *, budget: float = 0.3, least: int = 5) -> Timing:
    """Time a call for about ``budget`` seconds, in at least ``least`` rounds, or two of a longer call."""
    clock, iterations, estimate = make_clock(call, kind, device)
    least = min(least, 2) if estimate > budget else least
    rounds = max(least, min(200, int(budget / (iterations * estimate))))
    return summary([one_round(call, clock, iterations) for _ in range(rounds)])


def summary(seconds: list[float]) -> Timing:
    """Of the rounds of one call."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


def copy_bandwidth(device: str, nbytes: int, *, budget: float = 0.3) -> float:
    """Bytes read and written in a second by a copy of ``nbytes``: the limit for everything that moves features."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), "device", device, budget=budget).median
