"""A call on one shape, and everybody who can make it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS, REFERENCE, COMPILED = "ours", "reference", "compiled reference"
COPY, LINEAR = "copy", "nn.Linear"
FLOORS = (COPY, LINEAR)  # they compute something else: a limit to compare with
# Relative L2 error against float64 that a right result stays below. Ours are at the rounding of the result (1e-7, 3e-4
# and 2e-3); eager graphs that round at every operation reach 1e-2 in bf16. A wrong function is off by 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    """One call of one operation.

    Attributes:
        operation, direction, shape: name it; together they are the group that providers are compared in.
        nbytes: that have to move, arguments read once and results written once.
        make: fresh inputs, different every time.
        functions: by provider, from the inputs to the result.
        error: of a result for some inputs, relative to float64.
        dtype: of the result.
    """

    operation: str
    direction: str
    shape: str
    nbytes: int
    make: Callable[[], tuple[Any, ...]]
    functions: dict[str, Callable[..., Any]]
    error: Callable[[tuple[Any, ...], Any], float]
    dtype: torch.dtype
    _sets: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def group(self) -> str:
        return f"{self.operation}/{self.direction}/{self.shape}"

    def ready(self, provider: str, *, sets: int = 1) -> tuple[Callable[[], Any], float | None]:
        """The call of one provider, once its result has been found right, and the error of that result.

        Args:
            provider: a key of ``functions``.
            sets: different inputs that the calls take in turn, more than a cache holds.

        Raises:
            AssertionError: for a wrong result.
        """
        while len(self._sets) < sets:
            self._sets.append(self.make())
        function, error = self.functions[provider], None
        if provider == COMPILED:
            torch._dynamo.reset()  # or the ninth shape would run uncompiled
        if provider not in FLOORS:
            error = self.error(self._sets[0], function(*self._sets[0]))
            limit = TOLERANCE[self.dtype]
            assert error <= limit, f"{provider} computes {self.group} with an error of {error:.1e}, more than {limit}"
        turn = itertools.cycle(self._sets[:sets])
        return lambda: function(*next(turn)), error


def relative_error(result: Tensor, exact: Tensor) -> float:
    """In the L2 norm."""
    return float((result.double() - exact).norm() / exact.norm())


def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a reference for fixed shapes; nothing happens before the first call."""
    return torch.compile(reference, dynamic=False)


def copier(nbytes: int, device: str) -> Callable[..., Tensor]:
    """A copy that moves ``nbytes`` in all, whatever it is called with."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda *_: target.copy_(source)


def some(tokens: int) -> slice:
    """The tokens that a result is checked on."""
    return slice(0, tokens, max(1, tokens // 64))
