"""Memory that stays with the process, as it does under CUDA's caching allocator.

glibc gives freed memory back to the system, or does not, depending on what happens to lie at the end of the heap; the
step that takes it again waits for every page to be cleared. On the demo at batch 256 that is 7,600 pages and a tenth of
a full step, of the full sampler in one run and of a cache in the next.
"""

import ctypes

# From malloc.h; values are ints.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for all its threads; False where the C library is not glibc.

    To be called before the memory to be measured is first taken.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 1 << 26}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
