"""Which batch size is worth waiting for: measured at warm-up, where larger batches are not faster by themselves.

On a GPU a larger batch is faster until it is full. On a CPU it depends on the model: a small one gains from sharing a
run's fixed cost, a large one loses when its intermediates leave the cache, and its first picture waits for the last.
"""

from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter
from typing import Final

# The ceiling stays unless a smaller size is faster by more than that, in pictures a second: what is measured beside
# other work is not exact, and too small a batch costs more, behind a queue, than too large a one.
WORTH: Final = 1.05
CLOSE: Final = 1.02  # of the sizes this near to the fastest, the smallest: it answers sooner
MOST_ROUNDS: Final = 5
BUDGET_SECONDS: Final = 1.0


def fastest_size(
    run: Callable[[int], object], sizes: Sequence[int], *, clock: Callable[[], float] = perf_counter
) -> int:
    """Return the largest size, or a smaller one that is clearly faster, in pictures a second.

    Each round runs every size once, so that what else the machine does meets all of them, and the fastest run of each
    counts, since all that disturbs a run makes it longer.

    Args:
        run: runs a batch of so many pictures; the largest has been run before.
        sizes: ascending.
        clock: in seconds.

    Returns:
        One of `sizes`. There is one round at least; no other begins when a second is over.
    """
    shortest = dict.fromkeys(sizes, inf)
    end = clock() + BUDGET_SECONDS
    for _ in range(MOST_ROUNDS):
        for size in sizes:
            start = clock()
            run(size)
            shortest[size] = min(shortest[size], clock() - start)
        if clock() >= end:
            break
    rates = {size: size / max(seconds, 1e-9) for size, seconds in shortest.items()}
    best = max(rates.values())
    if rates[sizes[-1]] * WORTH >= best:
        return sizes[-1]
    return next(size for size in sizes if rates[size] * CLOSE >= best)
