"""How glibc's allocator treats the memory that this process frees.

Both functions do nothing with another C library, or if the environment sets the allocator itself.
"""

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_ARENA_MAX, _MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -4, -3, -1


def keep_freed_memory() -> None:
    """Keeps it in one heap for all threads, so that a training step on CPUs reuses it.

    XLA:CPU allocates a step's arrays afresh, and the first access to each new page is a page fault:
    without these a step takes 10 to 18 % less time (`python scripts/benchmark.py train_step`).
    Call it before JAX starts its threads, which get heaps of their own.
    """
    _set({_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory() -> None:
    """Returns each array of a megabyte or more to the system as soon as it is freed.

    glibc would keep such arrays in its heaps, which fragment where arrays of many sizes come and
    go.
    """
    _set({_MMAP_THRESHOLD: 2**20})


def _set(parameters: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        for parameter, value in parameters.items():
            mallopt(parameter, value)
