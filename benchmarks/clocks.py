"""Two clocks: the time of a call on the device, and the time that its caller waits.

    device   CUDA events around calls that are queued behind other work, so that the device never waits for the host
    wall     the host's clock around calls and a synchronisation

On an idle stream, events around calls shorter than about 100 us would measure the host's gaps. On a CPU both clocks are
the same.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

MOST_QUEUED = 20  # calls queued at once; a stream holds about a thousand launches before the host has to wait
BACKLOG_CYCLES_PER_SECOND = 2.0e9  # approximate clock rate of an SM
LONGEST_BACKLOG = 0.05  # seconds


class Clock(Protocol):
    """``start()``, then the calls, then ``stop()``, which returns the seconds in between."""

    def start(self) -> None: ...

    def stop(self) -> float: ...


class WallClock:
    """The time that the caller waits; the device is idle before and after."""

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
    """The time on the device between two events, queued behind ``backlog`` seconds of other work."""

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
    """A clock for pytest-benchmark: a function that is called before and after the timed calls."""

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
    """Seconds of one call: the median of the rounds, and their 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    rounds: int

    def as_json(self, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


def one_round(call: Callable[[], Any], clock: Clock, iterations: int) -> float:
    """Seconds per call, the mean of ``iterations`` calls."""
    clock.start()
    for _ in range(iterations):
        call()
    return clock.stop() / iterations


def make_clock(call: Callable[[], Any], kind: str, device: str) -> tuple[Clock, int, float]:
    """The clock ``kind`` for this call, the number of calls in a round, and an estimate of the seconds per call."""
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
    """Time a call for about ``budget`` seconds in at least ``least`` rounds; two rounds for a call longer than that."""
    clock, iterations, estimate = make_clock(call, kind, device)
    least = min(least, 2) if estimate > budget else least
    rounds = max(least, min(200, int(budget / (iterations * estimate))))
    return summary([one_round(call, clock, iterations) for _ in range(rounds)])


def summary(seconds: list[float]) -> Timing:
    """The timing from the seconds of each round."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


def copy_bandwidth(device: str, nbytes: int, *, budget: float = 0.3) -> float:
    """Bytes read and written per second by a copy of ``nbytes``: the upper limit for operations on features."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), "device", device, budget=budget).median
