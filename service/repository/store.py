"""Which version of the model is live: load, verify, warm up, swap, drain the old one.

The highest version in the folder serves, or the pinned one. A version goes live only after its metadata, graph and
golden images have passed on the engines that will serve it. A version that fails is refused with a reason and tried
again when its files change; the live version goes on serving.

To roll back, pin a version, or delete the highest one: the next lower one goes live. A version whose folder is gone
serves from memory until another one passes.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from service.batching.batcher import DynamicBatcher
from service.engine.metadata import MODEL_FILE
from service.engine.onnx_engine import Engine
from service.engine.session import EngineError, Provider
from service.engine.thread import BackgroundPoll, run_in_thread
from service.errors import NotReady
from service.repository.folder import GOLDEN_FILE, Golden, ModelVersion, check_files, load_golden
from service.repository.golden_check import GoldenMismatchError, check_golden
from service.repository.versions import (
    LiveModel,
    NoUsableVersionError,
    StoreObserver,
    VersionRecord,
    open_engines,
    open_in_thread,
    scan,
)
from service.settings import Settings

logger = logging.getLogger(__name__)

# A network disk that hangs must not block the store.
SCAN_TIMEOUT_S = 10.0

OpenEngines = Callable[[Path, Settings], Sequence[Engine]]


class ModelStore:
    """Keeps the right version of a model folder live. Belongs to one event loop; versions load in threads.

    Args:
        settings: name the model folder, and say how its versions are loaded.
        observer: counts batches and versions.
        open_engines: opens the engines of a version folder; the default opens `OnnxEngine`s.

    Attributes:
        live: the model that serves; None before `load`. Take a `lease` to use it.
        failure: why a batcher has failed, so that the process should be replaced; "" until then.
    """

    def __init__(
        self, settings: Settings, observer: StoreObserver, *, open_engines: OpenEngines = open_engines
    ) -> None:
        self._settings = settings
        self._folder = settings.model_dir
        self._pinned = settings.model_version
        self._observer = observer
        self._open_engines = open_engines
        self._records: dict[int, VersionRecord] = {}
        self._live_record: VersionRecord | None = None
        self._reloading = asyncio.Lock()
        self._scanning, self._describing, self._is_hanging = BackgroundPoll(), BackgroundPoll(), False
        self._is_gone = False
        self._retiring: dict[asyncio.Task[None], LiveModel] = {}
        self.live: LiveModel | None = None
        self.failure = ""

    async def load(self) -> None:
        """Make the best version live, for the first time.

        Raises:
            NoUsableVersionError: there is no version, or all were refused; the message has the reasons.
            OSError: as `reload`.
        """
        await self.reload()
        if self.live is None:
            raise NoUsableVersionError(self._why_none())

    async def watch(self) -> None:
        """Poll the folder for new versions for ever; run it as a task."""
        read_error = ""
        while True:
            await asyncio.sleep(self._settings.model_poll_s)
            try:
                await self.reload()
            except OSError as error:  # the folder may be unreachable for a moment; the live version serves on
                if str(error) != read_error:  # once, and not at every poll
                    logger.error("%s: can't be polled for new versions: %s", self._folder, error)
                read_error = str(error)
            except Exception:
                logger.exception("%s: polling for new versions failed", self._folder)
            else:
                read_error = ""

    async def reload(self) -> list[VersionRecord]:
        """Scan the folder now, swap to a better version if there is one, and return `versions()`.

        Raises:
            OSError: the folder can't be read, or the scan took longer than SCAN_TIMEOUT_S.
        """
        async with self._reloading:
            await self._scan()
            await self._take_best()
            self._log_if_gone()
            if self.live is not None:
                await self._describe_all(self.live.provider)
        return self.versions()

    def lease(self) -> LiveModel:
        """Hold the live model while one request is served: `with store.lease() as live:`.

        A model retires after its last lease has ended, so its batcher serves every holder.

        Raises:
            NotReady: no version is live yet.
        """
        if self.live is None:
            raise NotReady
        return self.live

    def versions(self) -> list[VersionRecord]:
        """List the versions in the folder and the live one, ascending."""
        records = dict(self._records)
        if self._live_record is not None:
            records[self._live_record.number] = self._live_record
        return [records[number] for number in sorted(records)]

    @property
    def queue_length(self) -> int:
        """Images waiting for a batch, those of a version that retires too."""
        return sum(model.batcher.queue_length for model in self._serving())

    @property
    def refused_versions(self) -> int:
        """Number of refused versions that would otherwise serve in place of the live one."""
        lowest = 0 if self.live is None else self.live.version
        return sum(
            bool(record.reason) and not record.serving and number >= lowest and self._pinned in (None, number)
            for number, record in self._records.items()
        )

    def abort(self) -> None:
        """Fail all queued and running requests of all models with Draining at once."""
        for model in self._serving():
            model.batcher.abort()

    async def close(self) -> None:
        """Serve the queued requests of all models, and free the models.

        After a failure it frees nothing: on a GPU that has gone, onnxruntime's destructors abort the process, which
        would change its exit status.
        """
        self._scanning.close()
        self._describing.close()
        async with self._reloading:
            models = self._serving()
            for task in self._retiring:
                task.cancel()
            for model in models:
                await model.batcher.drain()
                if not self.failure:
                    await model.batcher.close()

    def _serving(self) -> list[LiveModel]:
        return [*self._retiring.values(), *([self.live] if self.live is not None else [])]

    async def _scan(self) -> None:
        """Update the records of the folder's versions; a changed version gets a new record."""
        found = await self._scanning.run(partial(scan, self._folder), SCAN_TIMEOUT_S)
        known = self._records
        if self._live_record is not None:  # its folder may have been unreachable for a moment
            known = {self._live_record.number: self._live_record, **known}
        self._records = {
            version.number: known[version.number]
            if version.number in known and known[version.number].matches(fingerprint)
            else VersionRecord(version, fingerprint)
            for version, fingerprint in found
        }

    def _log_if_gone(self) -> None:
        """Log once that the live version is in memory alone, since the next start would fail."""
        is_gone = self.live is not None and self.live.version not in self._records
        if self.live is not None and is_gone and not self._is_gone:
            logger.warning(
                "version %d: its folder is gone from %s; it serves from memory, and the next start will not find it",
                self.live.version,
                self._folder,
            )
        self._is_gone = is_gone

    async def _take_best(self) -> None:
        """Try candidates from the highest down, until one is live already or passes.

        The live version serves from memory if its own files have changed and fail.
        """
        for number in sorted(self._records, reverse=True):
            record = self._records[number]
            if record.serving:
                return
            if (self._pinned is None or number == self._pinned) and not record.reason and await self._try(record):
                return
            if self.live is not None and number == self.live.version:
                return

    async def _try(self, record: VersionRecord) -> bool:
        """Make a version live, or record why it is refused."""
        number = record.number
        try:
            model = await self._open(record.version)
        except Exception as error:  # no broken folder may end the live version
            record.reason = str(error) or repr(error)
            logger.error("version %d: refused: %s", number, record.reason)
            self._observer.model_refused(number, record.reason)
            return False
        for other in self._records.values():
            other.serving = other is record
        self._live_record = record
        record.metadata = model.metadata
        self._swap(model)
        return True

    async def _open(self, version: ModelVersion) -> LiveModel:
        """Open the best file for the provider; float32 if a variant's golden check fails on this processor."""
        try:
            return await self._open_file(version, self._settings)
        except GoldenMismatchError as error:
            if self._settings.precision != "auto" or error.precision == "float32":
                raise
            logger.warning("version %d: float32 instead of %s, since %s", version.number, error.precision, error)
            return await self._open_file(version, self._settings.model_copy(update={"precision": "float32"}))

    async def _open_file(self, version: ModelVersion, settings: Settings) -> LiveModel:
        """Load, warm up and verify a version within `load_timeout_s`."""
        try:
            async with asyncio.timeout(settings.load_timeout_s) as limit:
                await run_in_thread(partial(check_files, version.path))
                golden = await run_in_thread(partial(load_golden, version.path / GOLDEN_FILE))
                engines = await open_in_thread(partial(self._open_engines, version.path, settings))
                return await self._checked(version, engines, golden)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise EngineError(
                f"{version.path}: was not loaded, warm and checked within {settings.load_timeout_s:g} s"
            ) from error

    async def _checked(self, version: ModelVersion, engines: Sequence[Engine], golden: Golden) -> LiveModel:
        """Warm up and verify opened engines, each in its engine thread."""
        batcher = DynamicBatcher(
            engines,
            self._observer,
            max_queue_delay_ms=self._settings.max_queue_delay_ms,
            run_timeout_ms=self._settings.run_timeout_ms,
            on_failure=partial(self._batcher_failed, version.number),
        )
        try:
            try:
                await batcher.on_each_engine(lambda engine: engine.warm_up())
                reports = await batcher.on_each_engine(
                    lambda engine: check_golden(engine, golden, is_whole=engine is engines[0])
                )
            except Exception as error:
                if isinstance(error, GoldenMismatchError):
                    self._observer.golden_checked(error.report.max_abs_difference)
                await batcher.close()  # waits for the engines that still run
                raise
        except asyncio.CancelledError:
            batcher.abandon()  # a run may hang, and must not block the cancellation
            raise
        self._observer.golden_checked(max(report.max_abs_difference for report in reports))
        batcher.start()
        rate = sum(report.rate for report, engine in zip(reports, engines, strict=True) if not engine.runs_alone)
        return LiveModel(version.number, engines, batcher, rate)

    def _swap(self, model: LiveModel) -> None:
        """Make `model` live; the old one serves its accepted requests and retires."""
        old, self.live = self.live, model
        logger.info("version %d: live on %s, %s", model.version, model.provider, model.metadata.precision)
        self._observer.model_live(model.version, model.metadata, model.provider)
        if old is not None:
            task = asyncio.create_task(old.retire(), name=f"retire-{old.version}")
            self._retiring[task] = old
            task.add_done_callback(lambda task: self._retiring.pop(task, None))

    async def _describe_all(self, provider: Provider) -> None:
        """Read the metadata of untried versions; do without if that hangs."""
        try:
            await self._describing.run(partial(self._describe, provider), SCAN_TIMEOUT_S)
        except TimeoutError as error:
            if not self._is_hanging:  # once, and not at every poll
                logger.error("%s: the metadata of a version can't be read: %s", self._folder, error.strerror)
            self._is_hanging = True
        else:
            self._is_hanging = False

    def _describe(self, provider: Provider) -> None:
        for record in self._records.values():
            record.describe(self._settings, provider)

    def _batcher_failed(self, version: int, reason: str) -> None:
        self.failure = f"version {version}: {reason}"

    def _why_none(self) -> str:
        if self._pinned is not None and self._pinned not in self._records:
            there = ", ".join(map(str, self._records)) or "none"
            return f"{self._folder}: version {self._pinned} is pinned and missing; the versions are: {there}"
        if (self._folder / MODEL_FILE).is_file():
            return f"{self._folder}: this is the folder of a version; name its parent, {self._folder.absolute().parent}"
        if not self._folder.is_dir():
            return f"{self._folder}: there is no such folder; name one that holds versions of a model"
        if not self._records:
            models = sorted(file.parents[1] for file in self._folder.glob(f"*/*/{MODEL_FILE}"))
            if models:
                return f"{self._folder}: holds model folders and is none; name one of them, as {models[0]}"
            return f"{self._folder}: holds no version; it must hold folders named 1, 2, ... with a model.onnx"
        reasons = "; ".join(
            f"version {number}: {record.reason}" for number, record in self._records.items() if record.reason
        )
        return f"{self._folder}: no version can serve: {reasons}"
