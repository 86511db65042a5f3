"""What the parts of a running service share, and whether it is ready."""

import asyncio
import logging
from typing import Final, Literal

from service.batching.admission import Admission
from service.batching.queue import FutureLike
from service.decoding.decoder import Decoder
from service.errors import Draining, NotReady
from service.metrics.registry import Metrics
from service.repository.store import ModelStore, OpenEngines
from service.repository.versions import LiveModel, NoUsableVersionError, open_engines
from service.settings import Settings

logger = logging.getLogger(__name__)


Status = Literal["ready", "loading", "draining", "failed"]
STOP_SECONDS: Final = 3.0  # for what runs to end, after what was accepted has been answered or cut off


class Service:
    """One worker: settings, models, limits and counts. Belongs to one event loop.

    Args:
        settings: all of them.
        open_engines: opens the engines of a version folder; the default opens real ones.

    Attributes:
        leaving: set when the process was told to stop: probes say so, and a connection ends with its next response.
        draining: set after that, when nothing new is accepted any more; what was accepted finishes.
        in_flight: requests for inference that have no response yet.
    """

    def __init__(self, settings: Settings, *, open_engines: OpenEngines = open_engines) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(
            settings.max_queue_size, settings.max_queue_bytes, max_wait=settings.request_timeout_ms / 1000
        )
        self.decoder = Decoder(settings, self.metrics.decode_process_ended)
        self.leaving = False
        self.draining = False
        self.in_flight: set[FutureLike] = set()
        self.store = ModelStore(settings, self.metrics, open_engines=open_engines)
        self._failure = ""
        self._task: asyncio.Task[None] | None = None
        self.metrics.max_queue_size.set(settings.max_queue_size)
        self.metrics.ready.set_function(lambda: self.probed_status == "ready")
        self.metrics.queue_length.set_function(lambda: self.queue_length)
        self.metrics.admitted_images.set_function(lambda: self.admission.images)
        self.metrics.admitted_background_images.set_function(lambda: self.admission.background_images)
        self.metrics.admitted_bytes.set_function(lambda: self.admission.bytes)
        self.metrics.max_batch_size.set_function(
            lambda: 0 if self.store.live is None else self.store.live.batcher.max_batch_size
        )
        self.metrics.refused_versions.set_function(lambda: self.store.refused_versions)

    def fail(self, reason: str) -> None:
        """Record why the process can't go on."""
        self._failure = self._failure or reason

    def start(self) -> None:
        """Load the model and watch its folder, in the background: probes are answered meanwhile."""
        self._task = asyncio.create_task(self._serve_models(), name="models")

    async def stop(self) -> None:
        """Refuse what comes, serve what was accepted, and free everything; what hangs is left behind."""
        self.draining = True
        try:
            async with asyncio.timeout(STOP_SECONDS):
                if self._task is not None:
                    self._task.cancel()
                    await asyncio.wait([self._task])
                await self.store.close()
        except TimeoutError:
            logger.warning("the model does not come to an end within %g s and is left as it is", STOP_SECONDS)
        self.decoder.close()

    def abort(self) -> None:
        """Respond with Draining to every request in flight; what is queued is not run."""
        for request in list(self.in_flight):
            request.set_exception(Draining())
        self.store.abort()

    @property
    def closes_connections(self) -> bool:
        """Whether a connection ends with its next response, so that its client comes back to another process."""
        return self.leaving or self.draining

    def check_ready(self) -> None:
        """Raise NotReady or Draining unless predictions are served."""
        match self.status:
            case "draining":
                raise Draining()
            case "loading":
                raise NotReady("The model is being loaded and checked.")
            case "failed":
                raise NotReady("The model has failed; the process is being replaced.")

    def check_probed(self) -> None:
        """Do the same for a probe, which is told Draining while the service is leaving."""
        if self.probed_status == "draining":
            raise Draining()
        self.check_ready()

    @property
    def failure(self) -> str:
        """Why the process can't go on and should be replaced; "" while it can."""
        return self._failure or self.store.failure

    @property
    def status(self) -> Status:
        """The state in one word."""
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.store.live is None else "ready"

    @property
    def probed_status(self) -> Status:
        """The state that probes are told: it is leaving while predictions may still be served."""
        return "draining" if self.leaving and not self.failure else self.status

    def lease(self) -> LiveModel:
        """Hold the live model; see `ModelStore.lease`."""
        return self.store.lease()

    @property
    def queue_length(self) -> int:
        """Images waiting for a batch."""
        return self.store.queue_length

    async def _serve_models(self) -> None:
        try:
            await self.decoder.start()  # before the model is, whose warm-up measures an idle machine
        except (OSError, TimeoutError) as error:
            self.fail(f"The decode processes can't be started: {error}.")
            return
        try:
            await self.store.load()
            await self.store.watch()
        except NoUsableVersionError as error:
            self.fail(str(error))
        except OSError as error:
            self.fail(f"{self.settings.model_dir}: the model folder can't be read: {error.strerror or error}.")
        except Exception as error:
            logger.exception("watching the model folder failed")
            self.fail(f"Watching the model folder failed: {error!r}.")
