"""Any module that denoises: you name its blocks and its head, and say which step a call is. It needs no diffusers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock, Thread, current_thread
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lesa.adapters.hooks import SkipState, hook_blocks, hook_heads, intercept, needs_gradients
from lesa.forecasters.base import Forecasters
from lesa.runtime.accelerator import Accelerator
from lesa.runtime.driver import Call, Session
from lesa.runtime.record import Record
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times


@dataclass
class ThreadPosition:
    """The latest step and branch of one thread, whether it is inside that step, and its calls at this step."""

    step: int = -1
    branch: str | None = None
    inside: bool = False
    calls: int = 0
    generation: object = field(default_factory=object)
    session: Session = field(default_factory=Session)


class Steps:
    """A module whose blocks run at the full steps of a plan. A context manager that restores the module at its end.

    Made by :func:`enable_module`. A call outside :meth:`step` runs unchanged, and so does one that needs gradients.

    Args:
        module: its calls are intercepted.
        accelerator: decides which of them run in full.
        times: of the schedule, [steps + 1], if they are known.
        blocks: return their inputs at predicted steps.
        heads: by name; the input of each is the feature that is predicted.
    """

    def __init__(
        self,
        module: nn.Module,
        accelerator: Accelerator,
        times: Tensor | None,
        blocks: Iterable[nn.Module],
        heads: Mapping[str, nn.Module],
    ) -> None:
        self._module = module
        self._accelerator = accelerator
        self._times = times
        self._state = SkipState(accelerator)
        self._lock = RLock()  # held during each call, since all hooks share one state
        self._positions: WeakKeyDictionary[Thread, ThreadPosition] = WeakKeyDictionary()
        self._undo = [
            intercept(module, self._call),
            *hook_blocks(self._state, blocks),
            *hook_heads(self._state, heads),
        ]

    @contextmanager
    def step(self, index: int, branch: str | None = None) -> Iterator[None]:
        """Calls in this context are step ``index`` of the plan; an earlier step than before begins a new generation.

        Each thread has its own generation.

        Args:
            index: from 0.
            branch: such as ``"cond"``; None: the calls at a step are ``call0``, ``call1``, ... by their order.
        """
        at = self._positions.setdefault(current_thread(), ThreadPosition())
        if index != at.step:
            at.calls = 0
        if index < at.step:
            at.generation = object()
        at.step, at.branch, at.inside = index, branch, True
        try:
            yield
        finally:
            at.inside = False

    @property
    def records(self) -> list[Record]:
        """For each branch of the latest generation the steps that were full and predicted, and the bytes kept."""
        return self._accelerator.records

    def disable(self) -> None:
        """Restore the module exactly; a second call does nothing."""
        with self._lock:
            while self._undo:
                self._undo.pop()()
            self._accelerator.reset()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._accelerator.end(failed=True)
        self.disable()

    @torch.compiler.disable(recursive=False)
    def _call(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            if not self._begin(args, kwargs):
                return forward(*args, **kwargs)
            failed = True
            try:
                output = self._state.run(forward, args, kwargs)
                failed = False
                return output
            finally:
                self._state.end(failed=failed)

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Ask the driver about a call; False: the call is no step."""
        at = self._positions.get(current_thread())
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if at is None or not at.inside or needs_gradients(self._module, inputs):
            return False
        call = Call(
            component="transformer",
            branch=at.branch or f"call{at.calls}",
            step=at.step,
            times=self._times,
            generation=at.generation,
            signature=tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs),
            session=at.session,
        )
        at.calls += 1
        self._state.begin(call, None)
        return True


def enable_module(
    module: nn.Module,
    forecaster: Forecasters,
    plan: StepPlan,
    *,
    blocks: Iterable[nn.Module],
    head: nn.Module | Mapping[str, nn.Module],
    times: Tensor | Sequence[float] | None = None,
    max_history: int | None = None,
) -> Steps:
    """Predict the steps that a plan does not run, in any module.

    At a predicted step every block returns, for each of its outputs, an input of the same shape, and the input of the
    head is replaced by the prediction. So the head must come after all blocks, and only the head may use what they
    return. A block whose outputs have other shapes than its inputs keeps running.

    Args:
        module: called once a step for each branch, inside ``steps.step(i)``.
        forecaster: one for all branches, or one for each ``("transformer", branch)``.
        plan: which steps are full.
        blocks: modules inside ``module``, such as ``module.blocks``.
        head: a module inside ``module``, such as its final norm; its first argument is the feature that is predicted.
            Several by name if the model has several outputs.
        times: noise levels [steps + 1], falling to 0; None is enough for a forecaster that only counts steps.
        max_history: as in :func:`lesa.enable`.

    Returns:
        A context manager that says with :meth:`Steps.step` which step a call is.

    Raises:
        ValueError: if blocks or head are not inside the module, or the times do not fit the plan.
    """
    blocks, heads = list(blocks), dict(head) if isinstance(head, Mapping) else {"head": head}
    inside = set(module.modules())
    if not blocks or not heads or not inside.issuperset([*blocks, *heads.values()]):
        raise ValueError(f"name blocks and a head that are inside {type(module).__name__}, such as its final norm")
    schedule = None if times is None else as_times(times, plan.num_steps)
    return Steps(module, Accelerator(forecaster, plan, max_history), schedule, blocks, heads)
