"""Batch size tuning: measures at warm-up which batch size is fastest on a CPU.

On a GPU larger batches are faster until it is full. On a CPU it depends on the model: a small one gains from sharing
a run's fixed cost, a large one loses when its intermediates leave the cache.
"""

from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter
from typing import Final

# A smaller size wins only if it is faster by more than this factor, in images a second: measurements beside other
# work are inexact, and behind a queue too small a batch costs more than too large a one.
MIN_SPEEDUP: Final = 1.05
MIN_ROUNDS: Final = 2
MAX_ROUNDS: Final = 5
BUDGET_SECONDS: Final = 1.0
# The fixed cost of a run is below a millisecond: a longer batch shares nothing worth its first image's wait.
MAX_RUN_SECONDS: Final = 0.1


def fastest_size(
    run: Callable[[int], object], sizes: Sequence[int], *, clock: Callable[[], float] = perf_counter
) -> int:
    """Return the largest size that runs within MAX_RUN_SECONDS and is about as fast as the fastest.

    Speed is images a second; about as fast means within MIN_SPEEDUP. Sizes that would take too long, by the time of
    one image, are not run. Each round runs the same number of images at every size, so that other work on the machine
    delays all sizes alike. The fastest round of each size counts, since disturbances only add time.

    Args:
        run: runs a batch of this many images; the largest has been run before.
        sizes: batch sizes, ascending.
        clock: monotonic, in seconds.

    Returns:
        One of `sizes`, after MIN_ROUNDS to MAX_ROUNDS rounds; none starts after BUDGET_SECONDS but the first ones.
    """

    def timed(size: int, times: int) -> float:
        start = clock()
        for _ in range(times):
            run(size)
        return max(clock() - start, 1e-9) / times

    end = clock() + BUDGET_SECONDS
    one = min(timed(sizes[0], 1) for _ in range(MIN_ROUNDS)) / sizes[0]
    tried = [size for size in sizes if size * one <= MAX_RUN_SECONDS] or [sizes[0]]
    shortest = dict.fromkeys(tried, inf)
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and clock() >= end:
            break
        for size in tried:
            shortest[size] = min(shortest[size], timed(size, tried[-1] // size))
    rates = {size: size / seconds for size, seconds in shortest.items()}
    best = max(rates.values())
    return max(size for size in tried if rates[size] * MIN_SPEEDUP >= best)
