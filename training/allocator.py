"""How the C library manages memory: a training step on a CPU need not get the same pages from the kernel each time.

And how errors tell of too little of it.
"""

from __future__ import annotations

import ctypes

import torch

# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_INT = 2**31 - 1  # what an int holds, bytes

# torch's own allocator on a GPU alone has a class for it. These are the words of that on a CPU, of CUDA and of its
# libraries, which take memory for themselves: the first product fails so beside a service that leaves little.
OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, up to 2 GiB at the heap's end, and take large blocks from the heap as well.

    By default glibc maps every block above 32 MiB at most anew and gives it back when it is freed; the kernel then
    zeroes each of its pages at their first touch. Activations are such blocks: a step of 128 images had 160,000 page
    faults, and takes 0.7 of the time without them (docs/experiments/training-speed.md). The highest use of memory
    stays what it was.

    Returns:
        Whether the C library took it; others than glibc have no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_INT)) and bool(mallopt(M_TRIM_THRESHOLD, MAX_INT))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch or numpy ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY_MESSAGES
    )
