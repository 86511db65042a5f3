"""Which batch size is worth waiting for: measured at warm-up, where larger batches are not faster by themselves.

On a GPU a larger batch is faster until it is full. On a CPU it depends on the model: a small one gains from sharing a
run's fixed cost, a large one loses when its intermediates leave the cache, and its first image waits for the last.
"""

from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter
from typing import Final

# A size gives way to a smaller one that is faster by more than that, in images a second: what is measured beside
# other work is not exact, and too small a batch costs more, behind a queue, than too large a one.
MIN_SPEEDUP: Final = 1.05
MIN_ROUNDS: Final = 2
MAX_ROUNDS: Final = 5
BUDGET_SECONDS: Final = 1.0
# What a run costs apart from its images is below a millisecond: a batch that takes longer than this shares nothing
# worth sharing any more, and its first image waits for its last.
MAX_RUN_SECONDS: Final = 0.1


def fastest_size(
    run: Callable[[int], object], sizes: Sequence[int], *, clock: Callable[[], float] = perf_counter
) -> int:
    """Return the largest size that runs within a tenth of a second and is about as fast as the fastest.

    Fast is meant in images a second, and about as fast within a twentieth. By the time of a single image, larger
    sizes are not even tried.

    Each round runs every size, as often as it takes for as many images as the largest has: what else the machine does
    then meets all of them alike, where a short run would often slip through and a long one never. The fastest round of
    each counts, since all that disturbs a run makes it longer.

    Args:
        run: runs a batch of so many images; the largest has been run before.
        sizes: ascending.
        clock: in seconds.

    Returns:
        One of `sizes`. There are two rounds at least, and up to five as long as a second is not over.
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
