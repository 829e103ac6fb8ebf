"""Whether a model is called with the times of its schedule, which precomputed outputs are computed for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Pipelines round a time twice on its way to the model: to the dtype of the latents, and when it is divided by 1000.
ROUNDINGS = 2


class TimeCheck:
    """Compares the times of one branch in one generation.

    On a CPU, and at the first call, the numbers are compared at once. At later steps on a GPU the host would have to
    wait for the step before, so a copy is compared when it has arrived. Code that changes times usually does so from
    the first step on, and then no output is precomputed; otherwise it is noticed a few steps later.
    """

    def __init__(self) -> None:
        self._compared = False
        self._wrong = False
        self._in_flight: list[tuple[Tensor, float, torch.cuda.Event]] = []

    def begin(self, given: Tensor, expected: float) -> None:
        """Compare the first time of a generation, a full step's, when the GPU has no other work to wait for."""
        if not self._compared:
            self.passes(given, expected)

    def passes(self, given: Tensor, expected: float) -> bool:
        """Whether a time [...] is the expected one, as far as it has been compared."""
        self._read()
        if self._wrong:
            return False
        if self._compared and given.is_cuda:
            self._send(given, expected)
            return True
        self._compared = True
        return agrees(given, expected)

    def _send(self, given: Tensor, expected: float) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        copy = torch.empty(given.shape, dtype=given.dtype, pin_memory=True).copy_(given, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._in_flight.append((copy, expected, arrived))

    def _read(self) -> None:
        while self._in_flight and self._in_flight[0][2].query():
            given, expected, _ = self._in_flight.pop(0)
            self._wrong = self._wrong or not agrees(given, expected)


def agrees(given: Tensor, expected: float) -> bool:
    """Whether every number of a tensor is the expected one, to within what its dtype rounds."""
    precision = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
    tolerance = ROUNDINGS * precision * abs(expected) + (0 if precision else 1)  # an integer may have been cut off
    return all(abs(number - expected) <= tolerance for number in _numbers(given.tolist()))


def _numbers(values: Any) -> Iterator[float]:
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    else:
        yield float(values)
