"""One call of one operation on one shape, by all providers."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS, REFERENCE, COMPILED = "ours", "reference", "compiled reference"
COPY, LINEAR = "copy", "nn.Linear"
FLOORS = (COPY, LINEAR)  # they compute other functions and are lower limits of the time
# Limits of the relative L2 error against float64. Ours have the error of rounding the result (1e-7, 3e-4 and 2e-3);
# eager graphs, which round after every operation, reach 1e-2 in bf16. A wrong function has an error of about 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    """One call of one operation.

    Attributes:
        operation, direction, shape: names; together they are the group in which providers are compared.
        nbytes: the bytes to move if arguments are read once and results are written once.
        make: makes new random inputs.
        functions: by provider, the function from the inputs to the result.
        error: the relative error of a result for given inputs, against float64.
        dtype: dtype of the result.
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
        """Check the result of one provider; return its call and the error of the result.

        Args:
            provider: a key of ``functions``.
            sets: number of inputs that the calls use in turn, so that they do not stay in the cache.

        Raises:
            AssertionError: for a wrong result.
        """
        while len(self._sets) < sets:
            self._sets.append(self.make())
        function, error = self.functions[provider], None
        if provider == COMPILED:
            torch._dynamo.reset()  # otherwise the ninth shape would run uncompiled
        if provider not in FLOORS:
            error = self.error(self._sets[0], function(*self._sets[0]))
            limit = TOLERANCE[self.dtype]
            assert error <= limit, f"{provider} computes {self.group} with an error of {error:.1e}, more than {limit}"
        turn = itertools.cycle(self._sets[:sets])
        return lambda: function(*next(turn)), error


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The relative error in the L2 norm."""
    return float((result.double() - exact).norm() / exact.norm())


def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a reference for fixed shapes; it is compiled at the first call."""
    return torch.compile(reference, dynamic=False)


def copier(nbytes: int, device: str) -> Callable[..., Tensor]:
    """A copy that reads and writes ``nbytes`` in total; it ignores its arguments."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda *_: target.copy_(source)


def some(tokens: int) -> slice:
    """The tokens for which a result is checked."""
    return slice(0, tokens, max(1, tokens // 64))
