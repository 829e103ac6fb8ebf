"""Keeps freed memory in the process: otherwise some temporaries need new pages at every call, and times vary."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed memory and never map blocks; references gain most, since they make most temporaries.

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
