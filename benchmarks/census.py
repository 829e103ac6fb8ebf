"""Counts operators, launches and bytes of a call. Counts do not vary between runs, unlike times."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise every profile prints two lines

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Census:
    """Attributes:
    operators: number of operators that PyTorch dispatches, nested ones included.
    allocated: bytes of all allocations.
    peak: the most bytes allocated at the same time, in addition to what was allocated before.
    launches: number of kernel launches on a GPU; 0 on a CPU.
    """

    operators: int
    allocated: int
    peak: int
    launches: int


def census(call: Callable[[], Any]) -> Census:
    """Counts of the second call; the first one may initialise caches."""
    cuda = torch.cuda.is_available()
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        result = call()
        if cuda:
            torch.cuda.synchronize()
    del result
    results: Any = profiler.profiler
    events = list(_flat(results.kineto_results.experimental_event_tree()))
    allocations = (e.typed[1] for e in sorted(events, key=_start) if _kind(e) == "Allocation")
    sizes = [int(a.alloc_size) for a in allocations if a.device.type == ("cuda" if cuda else "cpu")]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    launches = 0
    if cuda:
        on_device = (e for e in results.kineto_results.events() if str(e.device_type()).endswith("CUDA"))
        launches = sum(not e.name().startswith(("Memcpy", "Memset", "gpu_memcpy")) for e in on_device)
    return Census(
        operators=sum(_kind(e) == "TorchOp" for e in events),
        allocated=sum(size for size in sizes if size > 0),
        peak=peak,
        launches=launches,
    )


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched in Triton's interpreter."""
    from triton.runtime import interpreter

    names: list[str] = []
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = run


def _flat(events: Any) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flat(event.children)


def _kind(event: Any) -> str:
    return str(event.typed[0]).rsplit(".", 1)[-1]


def _start(event: Any) -> int:
    return int(event.start_time_ns)
