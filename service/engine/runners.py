"""Batches on a CPU, which run as they are, and what all runners need.

Shape letters: N images of a batch, H and W input size, C classes, D width of the features.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.engine.metadata import FEATURES_NAME, INPUT_NAME, OUTPUT_NAME, UNFAMILIARITY_NAME, ModelMetadata

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Features = NDArray[np.float32]
Scores = NDArray[np.float32]

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


class Outputs(NamedTuple):
    """The outputs of one batch, by their names in the graph.

    Attributes:
        logits: float32 [N, C].
        unfamiliarity: float32 [N]; None where the graph has no such output.
        features: float32 [N, D]; None where nobody asked for them.
    """

    logits: Logits
    unfamiliarity: Scores | None = None
    features: Features | None = None


def names_of(metadata: ModelMetadata) -> list[str]:
    """Return the outputs that every run fetches: all but the features, which few requests ask for."""
    return [OUTPUT_NAME] if metadata.unfamiliarity is None else [OUTPUT_NAME, UNFAMILIARITY_NAME]


def fetch(session: Any, names: Sequence[str], images: Images, options: Any = None) -> Outputs:
    """Run uint8 [N, H, W, 3] for some of the graph's outputs."""
    return Outputs(**dict(zip(names, session.run(names, {INPUT_NAME: images}, options), strict=True)))


def concatenate(parts: Sequence[Outputs]) -> Outputs:
    """Join the outputs of several batches, which have no features."""
    scores = [part.unfamiliarity for part in parts if part.unfamiliarity is not None]
    return Outputs(np.concatenate([part.logits for part in parts]), np.concatenate(scores) if scores else None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a run failed for lack of memory, so that a smaller one may succeed."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


class HostRunner:
    """Runs batches as they are: on a CPU, padded rows would take full time.

    Args:
        session: of onnxruntime.
        max_batch_size: the largest batch, in images.
        names: of the outputs that every run fetches.

    Attributes:
        sizes: batch sizes to run at warm-up, descending; the first is the largest that can run.
        warm_up_runs: runs until a size is at full speed.
    """

    def __init__(self, session: Any, max_batch_size: int, names: Sequence[str] = (OUTPUT_NAME,)) -> None:
        self._session = session
        self._names = [*names]
        self.warm_up_runs = 1
        self.sizes: Sequence[int] = descending({1, max_batch_size})

    def run(self, images: Images, *, with_features: bool = False) -> Outputs:
        """Run uint8 [N, H, W, 3]."""
        return fetch(self._session, [*self._names, FEATURES_NAME] if with_features else self._names, images)

    def trim(self, images: Images) -> None:
        """Run a batch, and free the memory that onnxruntime's arena keeps from larger ones."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        fetch(self._session, self._names, images, options)

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
