"""What the batcher reports, to whoever counts. Called in the event loop's thread; must be quick."""

from typing import Protocol

from service.batching.queue import DropReason


class BatchObserver(Protocol):
    """Counts what happens to images."""

    def batch(self, size: int, seconds: float) -> None:
        """Take note of a batch of `size` images that took `seconds`."""

    def queued(self, seconds: float) -> None:
        """Take note of an image that waited for `seconds`; once for each image that was run."""

    def dropped(self, reason: DropReason) -> None:
        """Take note of an image that left the queue without a run."""

    def failed_batch(self, size: int) -> None:
        """Take note of a batch that failed, hung ones included."""


class NoObserver:
    """A `BatchObserver` that takes no note."""

    def batch(self, size: int, seconds: float) -> None:
        """Do nothing."""

    def queued(self, seconds: float) -> None:
        """Do nothing."""

    def dropped(self, reason: DropReason) -> None:
        """Do nothing."""

    def failed_batch(self, size: int) -> None:
        """Do nothing."""
