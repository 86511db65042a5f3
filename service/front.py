"""What the HTTP layer needs of the service behind it: in this process, or in another that runs the model.

It imports no engine, so that a process which only speaks HTTP loads no onnxruntime.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Literal, Protocol, Self

from service.admission import Admission
from service.artifact import ModelMetadata
from service.decoding import Decoder
from service.errors import Draining, NotReady
from service.fair_queue import Image, Outcome, Pixels, Prediction
from service.settings import Settings

PREDICT: Final = "/predict"
ROUTES: Final = frozenset(
    {PREDICT, "/health", "/health/live", "/health/ready", "/metrics", "/models", "/models/reload"}
    | {"/docs", "/openapi.json"}
)
# Who watches the service is answered where its clients hold all connections, or it would be taken for dead.
PROBES: Final = frozenset({b"/health", b"/health/live", b"/health/ready", b"/metrics"})
PROBE_CONNECTIONS: Final = 16
Status = Literal["ready", "loading", "draining", "failed"]


def known_route(path: str) -> str:
    """Return the path, or "other": what clients send must not become ever new label values."""
    return path if path in ROUTES else "other"


class RequestObserver(Protocol):
    """Counts what happens to requests. Must be quick."""

    def request(self, route: str, status: int) -> None:
        """Take note of one answered request."""

    def predicted(self, seconds: float, request_id: str) -> None:
        """Take note of one request to /predict, and of its id."""

    def decoded(self, seconds: float) -> None:
        """Take note of a request's time from its last byte to arrays."""

    def rejected(self, code: str) -> None:
        """Take note of one request that ended in an error."""


class Batcher(Protocol):
    """Classifies pictures: `service.batcher.DynamicBatcher`, or the way to one."""

    async def submit_many(self, images: Sequence[Image], *, deadline: float | None = None) -> list[Prediction]:
        """Classify the pictures of one request; see `DynamicBatcher.submit_many`."""

    def post(self, images: Sequence[Pixels], outcome: Outcome, deadline: float) -> int:
        """Classify pictures for somebody who does not await them; see `DynamicBatcher.post`."""

    def withdraw(self, number: int) -> None:
        """Take note that nobody waits any more for what `post` gave this number to."""


class ServedModel(Protocol):
    """The model of one request, from decode to answer: `with front.lease() as live:`."""

    @property
    def version(self) -> int:
        """Number of its folder."""

    @property
    def metadata(self) -> ModelMetadata:
        """Of the file that runs."""

    @property
    def batcher(self) -> Batcher:
        """Its own."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Front(ABC):
    """The service as the requests of one process see it. Belongs to one event loop.

    Args:
        settings: all of them.
        metrics: counts the requests.
        admission: bounds what is in the house.
        decode_threads: for large pictures.

    Attributes:
        leaving: set when the process was told to stop: probes say so, and a connection ends with its next answer.
        draining: set after that, when nothing new is accepted any more; what was accepted finishes.
        in_flight: requests to /predict that are being answered.
    """

    def __init__(
        self, settings: Settings, metrics: RequestObserver, admission: Admission, *, decode_threads: int
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.admission = admission
        self.decoder = Decoder(settings, decode_threads)
        self.leaving = False
        self.draining = False
        self.in_flight = 0

    @property
    def closes_connections(self) -> bool:
        """Whether a connection ends with its next answer, so that its client comes back to another process."""
        return self.leaving or self.draining

    @property
    @abstractmethod
    def failure(self) -> str:
        """Why the service can't go on and should be replaced; "" while it can."""

    @property
    @abstractmethod
    def status(self) -> Status:
        """The state in one word."""

    @abstractmethod
    def lease(self) -> ServedModel:
        """Hold the live model while one request is served.

        Raises:
            NotReady: nothing is live yet.
        """

    @abstractmethod
    def cut_off(self) -> None:
        """Answer everything that waits for the model with Draining: the time to finish is over."""

    def check_ready(self) -> None:
        """Raise NotReady or Draining unless predictions are served."""
        match self.status:
            case "draining":
                raise Draining()
            case "loading":
                raise NotReady("The model is being loaded and checked.")
            case "failed":
                raise NotReady("The model has failed; the process is being replaced.")

    def excess(self, connections: int) -> int:
        """Return how many of the connections to this process, the newest included, are too many; 0 and less: none."""
        return connections - self.settings.max_connections

    def disconnected(self, connections: int) -> None:  # noqa: B027 - one process alone need not know
        """Take note that one has closed, and so many are left."""
