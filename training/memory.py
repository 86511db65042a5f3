"""How the C library manages memory: a training step on a CPU need not get the same pages from the kernel each time."""

from __future__ import annotations

import ctypes

# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # what an int holds, bytes


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, up to 2 GiB at the heap's end, and take large blocks from the heap as well.

    By default glibc maps every block above 32 MiB at most anew and gives it back when it is freed; the kernel then
    zeroes each of its pages at their first touch. Activations are such blocks: a step of 128 pictures had 160,000 page
    faults, and takes 0.7 of the time without them (docs/experiments.md). The highest use of memory stays what it was.

    Returns:
        Whether the C library took it; others than glibc have no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
