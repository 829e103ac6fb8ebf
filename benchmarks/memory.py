"""Memory of a measurement: what a backward pass keeps, and freed memory that stays in the process."""

import ctypes
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed memory and never map blocks; otherwise temporaries need new pages, and times vary.

    By default glibc's threshold for mapping depends on earlier frees: the same reference then took 131 ms or 350 ms for
    the six predictions of an interval. A full step of the demo at batch 256 needed 7,600 new pages, a tenth of its
    time, in one run and none in the next. All threads share this memory.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(M_ARENA_MAX, 1)


def kept_for_backward(call: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without ``own``: inputs, parameters, buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call()
        del y
    return sum(kept.values())
