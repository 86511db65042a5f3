"""Batch size tuning: measures at warm-up which batch size is fastest on a CPU.

On a GPU larger batches are faster until it is full. On a CPU it depends on the model: a small one gains from sharing
a run's fixed cost, a large one loses when its intermediates leave the cache.
"""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, thread_time
from typing import Final

# A smaller size wins only if it is faster by more than this factor, in images a second: measurements beside other
# work are inexact, and behind a queue too small a batch costs more than too large a one.
MIN_SPEEDUP: Final = 1.05
MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 7
BUDGET_SECONDS: Final = 1.0
# The fixed cost of a run is below a millisecond: a longer batch shares nothing worth its first image's wait.
MAX_RUN_SECONDS: Final = 0.1


def fastest_size(
    run: Callable[[int], object],
    sizes: Sequence[int],
    *,
    clock: Callable[[], float] = thread_time,
    wall_clock: Callable[[], float] = perf_counter,
) -> int:
    """Return the largest size that runs within MAX_RUN_SECONDS and is about as fast as the fastest.

    Speed is images a second; about as fast means within MIN_SPEEDUP. Sizes that would take too long, by the time of
    one image, are not run. The rounds are compared, each with itself: all sizes run the same number of images in turn,
    so that other work on the machine delays all alike, and of a size's shares of the fastest the median counts.

    Args:
        run: runs a batch of this many images, in this thread.
        sizes: batch sizes, ascending.
        clock: monotonic, in seconds. That of the thread stands still while other programs have the processor.
        wall_clock: monotonic, in seconds.

    Returns:
        One of `sizes`, after MIN_ROUNDS to MAX_ROUNDS rounds; none starts after BUDGET_SECONDS but the first ones.
    """

    def timed(size: int, times: int) -> float:
        start = clock()
        for _ in range(times):
            run(size)
        return max(clock() - start, 1e-9) / times

    end = wall_clock() + BUDGET_SECONDS
    run(sizes[0])  # the first run of a size takes the memory for it
    one = min(timed(sizes[0], 1) for _ in range(MIN_ROUNDS)) / sizes[0]
    tried = [size for size in sizes if size * one <= MAX_RUN_SECONDS] or [sizes[0]]
    for size in reversed(tried[1:]):
        run(size)
    shares: dict[int, list[float]] = {size: [] for size in tried}
    for number in range(MAX_ROUNDS if len(tried) > 1 else 0):
        if number >= MIN_ROUNDS and wall_clock() >= end:
            break
        rates = {size: size / timed(size, tried[-1] // size) for size in tried[:: 1 if number % 2 else -1]}
        fastest = max(rates.values())
        for size, rate in rates.items():
            shares[size].append(rate / fastest)
    speeds = {size: median(seen or [1.0]) for size, seen in shares.items()}
    best = max(speeds.values())
    return max(size for size in tried if speeds[size] * MIN_SPEEDUP >= best)
