"""Which batch size is worth waiting for: measured at warm-up, where larger batches are not faster by themselves.

On a GPU a larger batch is faster until it is full. On a CPU it depends on the model: a small one gains from sharing a
run's fixed cost, a large one loses when its intermediates leave the cache, and its first picture waits for the last.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final

# A size must be this much faster than a smaller one, in pictures a second: a smaller batch answers sooner.
WORTH: Final = 1.03
RUNS: Final = 3  # of each size; the fastest counts, since all that disturbs a run makes it longer
BUDGET_SECONDS: Final = 2.0
PATIENCE: Final = 2  # sizes in a row that gained nothing


def fastest_size(
    run: Callable[[int], object], sizes: Sequence[int], *, clock: Callable[[], float] = perf_counter
) -> int:
    """Return the smallest size that no other beats by more than 3 %, in pictures a second.

    Args:
        run: runs a batch of so many pictures; each size has been run before, or pays for that in its first run.
        sizes: ascending.
        clock: in seconds.

    Returns:
        One of `sizes`. Larger ones are not tried when two in a row have gained nothing, or when the time is spent.
    """
    best, best_rate = sizes[0], 0.0
    useless = 0
    end = clock() + BUDGET_SECONDS
    for size in sizes:
        rate = size / _shortest(run, size, clock)
        if rate > best_rate * WORTH:
            best, best_rate, useless = size, rate, 0
        else:
            useless += 1
        if useless == PATIENCE or clock() >= end:
            break
    return best


def _shortest(run: Callable[[int], object], size: int, clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(RUNS):
        start = clock()
        run(size)
        seconds.append(clock() - start)
    return max(min(seconds), 1e-9)
