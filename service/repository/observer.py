"""What the model store reports, to whoever counts. Called in the event loop's thread; must be quick."""

from typing import Protocol

from service.batching.observer import BatchObserver
from service.engine.metadata import ModelMetadata
from service.engine.session import Provider


class StoreObserver(BatchObserver, Protocol):
    """Counts what becomes of versions, and the batches of all of them."""

    def model_live(self, version: int, metadata: ModelMetadata, provider: Provider) -> None:
        """Take note that this version serves from now on."""

    def model_refused(self, version: int, reason: str) -> None:
        """Take note that this version was tried and does not serve."""

    def golden_checked(self, max_abs_difference: float) -> None:
        """Take note of the largest difference of a logit on the golden images, passed or not."""
