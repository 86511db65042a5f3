"""Batches on a CPU, which run as they are, and what all runners need.

Shape letters: N images of a batch, H and W input size, C classes, D width of the features.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.engine.metadata import FEATURES_NAME, INPUT_NAME, OUTPUT_NAME

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Features = NDArray[np.float32]

# onnxruntime has no exception class for this. These are the messages of its arena, of CUDA and its libraries, and of
# C++.
OUT_OF_MEMORY_WORDS = (
    "failed to allocate memory",
    "is smaller than requested bytes",
    "out of memory",
    "resource allocation failed",
    "alloc_failed",
    "allocation_failed",
    "bad_alloc",
    "bad allocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a run failed for lack of memory, so that a smaller one may succeed."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


class HostRunner:
    """Runs batches as they are: on a CPU, padded rows would take full time.

    Attributes:
        sizes: batch sizes to run at warm-up, descending; the first is the largest that can run.
        warm_up_runs: runs until a size is at full speed.
    """

    def __init__(self, session: Any, max_batch_size: int) -> None:
        self._session = session
        self.warm_up_runs = 1
        self.sizes: Sequence[int] = descending({1, max_batch_size})

    def run(self, images: Images) -> Logits:
        """Classify uint8 [N, H, W, 3]; return float32 [N, C]."""
        (logits,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})
        return np.asarray(logits, dtype=np.float32)

    def run_with_features(self, images: Images) -> tuple[Logits, Features]:
        """Return as `run` float32 [N, C], and float32 [N, D]."""
        logits, features = self._session.run([OUTPUT_NAME, FEATURES_NAME], {INPUT_NAME: images})
        return logits, features

    def trim(self, images: Images) -> None:
        """Run a batch, and free the memory that onnxruntime's arena keeps from larger ones."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run([OUTPUT_NAME], {INPUT_NAME: images}, options)

    def shrink(self, failed: int) -> int:
        """Halve the size that failed with `failed` images; return the new largest, 0 for none."""
        half = (failed + 1) // 2 if failed > 1 else 0
        self.sizes = descending({1, half}) if half else ()
        return half

    def drop(self, size: int) -> None:
        """Remove a size from the warm-up."""
        self.sizes = [one for one in self.sizes if one != size]


def default_buckets(max_batch_size: int) -> list[int]:
    """Return powers of two up to `max_batch_size`, and that itself: at most half of a batch is padding."""
    return sorted({1 << power for power in range(max_batch_size.bit_length())} | {max_batch_size})


def descending(sizes: Iterable[int]) -> list[int]:
    """Return each size once, the largest first."""
    return sorted(set(sizes), reverse=True)
