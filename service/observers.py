"""What the batcher and the model store report, to whoever counts. Called in the event loop's thread; must be quick."""

from typing import Protocol

from service.artifact import ModelMetadata
from service.engine import Provider
from service.fair_queue import DropReason


class BatchObserver(Protocol):
    """Counts what happens to pictures."""

    def batch(self, size: int, seconds: float) -> None:
        """Take note of a batch of `size` pictures that took `seconds`."""

    def queued(self, seconds: float) -> None:
        """Take note of a picture that waited for `seconds`; once for each picture that was run."""

    def dropped(self, reason: DropReason) -> None:
        """Take note of a picture that left the queue without a run."""

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


class StoreObserver(BatchObserver, Protocol):
    """Counts what becomes of versions, and the batches of all of them."""

    def model_live(self, version: int, metadata: ModelMetadata, provider: Provider) -> None:
        """Take note that this version serves from now on."""

    def model_refused(self, version: int, reason: str) -> None:
        """Take note that this version was tried and does not serve."""

    def golden_checked(self, max_abs_difference: float) -> None:
        """Take note of the largest difference of a logit on the golden pictures, passed or not."""
