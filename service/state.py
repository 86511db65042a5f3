"""What the parts of a running service share, and whether it is ready."""

import asyncio
import logging
from typing import Literal

from service.admission import Admission
from service.decoding import Decoder
from service.errors import Draining, NotReady
from service.metrics import Metrics
from service.models import EngineOptions, ModelStore, NoUsableVersionError, OpenEngines
from service.settings import Settings
from service.versions import open_engines

logger = logging.getLogger(__name__)

Status = Literal["ready", "loading", "draining", "failed"]


class Service:
    """One service process: settings, models, limits and counts. Belongs to one event loop.

    Args:
        settings: all of them.
        open_engines: opens the engines of a version folder; the default opens real ones.

    Attributes:
        draining: set when the process was told to stop: nothing new is accepted, what was accepted finishes.
        in_flight: requests to /predict that are being answered.
    """

    def __init__(self, settings: Settings, *, open_engines: OpenEngines = open_engines) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(settings.max_queue_size, settings.max_queue_bytes)
        self.decoder = Decoder(settings)
        self.store = ModelStore(
            settings.model_dir,
            engine_options(settings),
            pinned_version=settings.model_version,
            poll_seconds=settings.model_poll_s,
            observer=self.metrics,
            open_engines=open_engines,
        )
        self.draining = False
        self.in_flight = 0
        self._load_failure = ""
        self._task: asyncio.Task[None] | None = None
        self.metrics.watch(
            ready=lambda: self.status == "ready",
            queue_length=lambda: self.queue_length,
            admitted_pictures=lambda: self.admission.pictures,
            admitted_bytes=lambda: self.admission.bytes,
            max_batch_size=lambda: self.max_batch_size,
            max_queue_size=settings.max_queue_size,
        )

    def start(self) -> None:
        """Load the model and watch its folder, in the background: probes are answered meanwhile."""
        self._task = asyncio.create_task(self._serve_models(), name="models")

    async def stop(self) -> None:
        """Refuse what comes, serve what was accepted, and free everything."""
        self.draining = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.store.close()
        self.decoder.close()

    @property
    def failure(self) -> str:
        """Why the process can't go on and should be replaced; "" while it can."""
        return self._load_failure or self.store.failure

    @property
    def status(self) -> Status:
        """The state in one word."""
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.store.live is None else "ready"

    @property
    def queue_length(self) -> int:
        """Pictures waiting for a batch."""
        return 0 if self.store.live is None else self.store.live.batcher.queue_length

    @property
    def max_batch_size(self) -> int:
        """Pictures that one run of the live model may have now; 0 while there is none."""
        return 0 if self.store.live is None else self.store.live.batcher.max_batch_size

    def check_ready(self) -> None:
        """Raise NotReady or Draining unless predictions are served."""
        match self.status:
            case "draining":
                raise Draining()
            case "loading":
                raise NotReady("The model is being loaded and checked.")
            case "failed":
                raise NotReady("The model has failed; the process is being replaced.")

    async def _serve_models(self) -> None:
        try:
            await self.store.load()
            await self.store.watch()
        except NoUsableVersionError as error:
            self._load_failure = str(error)
        except Exception as error:
            logger.exception("watching the model folder failed")
            self._load_failure = f"Watching the model folder failed: {error!r}."


def engine_options(settings: Settings) -> EngineOptions:
    """Pick what the engines and batchers need."""
    return EngineOptions(
        provider=settings.provider,
        device_ids=settings.device_ids,
        max_batch_size=settings.max_batch_size,
        intra_op_threads=settings.intra_op_threads,
        precision=settings.precision,
        gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        cuda_graphs=settings.cuda_graphs,
        tune_batch_size=settings.tune_batch_size,
        max_queue_delay_ms=settings.max_queue_delay_ms,
        run_timeout_ms=settings.run_timeout_ms,
    )
