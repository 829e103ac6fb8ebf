"""Memory that is kept by the process: without it a temporary costs new pages at every call, or does not, by chance."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc give nothing back and map nothing; the references, which make most temporaries, gain most.

    Left alone, its threshold for mapping a block moves with what was freed before: the same reference then took 131 ms
    or 350 ms for the six predictions of an interval; a full step of the demo at batch 256 waits for 7,600 new pages, a
    tenth of its time, in one run and for none in the next. All threads share this memory.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(M_ARENA_MAX, 1)
