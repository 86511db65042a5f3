"""What the batcher reports to the metrics. Called in the event loop; must be quick."""

from typing import Protocol

from service.batching.queue import DropReason


class BatchObserver(Protocol):
    """Counts images and batches."""

    def batch(self, size: int, seconds: float) -> None:
        """Record a batch of `size` images that took `seconds`."""

    def queued(self, seconds: float) -> None:
        """Record the wait of one image that was run."""

    def dropped(self, reason: DropReason) -> None:
        """Record an image that left the queue without a run."""

    def failed_batch(self, size: int) -> None:
        """Record a batch that failed or hung."""
