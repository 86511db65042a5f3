"""A version of the model: its files, its engines, its state, and its batcher while it is live."""

import asyncio
import errno
import logging
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from service.batching.batcher import BatchObserver, DynamicBatcher
from service.engine.cpus import usable_cores
from service.engine.metadata import MODEL_FILES, ArtifactError, ModelMetadata
from service.engine.onnx_engine import Engine, OnnxEngine
from service.engine.session import EngineError, Provider, choose_file, read_metadata, resolve_provider
from service.engine.thread import run_in_thread
from service.repository.folder import GOLDEN_FILE, ModelVersion, list_versions
from service.settings import Settings

logger = logging.getLogger(__name__)

MAX_CPU_ENGINES: Final = 4
SERVED_FILES = frozenset({*MODEL_FILES.values(), GOLDEN_FILE})
# Errors that last until somebody changes the version's folder.
PERMANENT_ERRNOS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP})
# Of each served file: name, size in bytes, mtime and ctime in ns; see `VersionRecord.matches`.
Fingerprint = tuple[tuple[str, int, int, int], ...]

# One folder or more and a file name, up to a separator of words in messages.
ABSOLUTE_PATH = re.compile(r"(?<![\w./])(?:/[^\s/:,;'\"()]+)+/([^\s/:,;'\"()]+)")


class NoUsableVersionError(Exception):
    """No version can serve. The message names the folder, and why each version was refused."""


class StoreObserver(BatchObserver, Protocol):
    """Counts versions, and the batches of all of them. Called in the event loop; must be quick."""

    def model_live(self, version: int, metadata: ModelMetadata, provider: Provider) -> None:
        """Record that this version serves from now on."""

    def model_refused(self, version: int, reason: str) -> None:
        """Record that this version was tried and refused."""

    def golden_checked(self, max_abs_difference: float) -> None:
        """Record the largest difference of a logit on the golden images, passed or not."""


class LiveModel:
    """A version that serves. A request holds one from decoding to response: `with store.lease() as live:`.

    Attributes:
        version: number of its folder.
        metadata: of the file that runs.
        provider: where it runs.
        batcher: its own, so that input size, labels, version and results belong together.
        expected_rate: images a second, as the golden images ran; what serving shows is better known.
    """

    def __init__(
        self, version: int, engines: Sequence[Engine], batcher: DynamicBatcher, expected_rate: float = 0.0
    ) -> None:
        self.version = version
        self.metadata: ModelMetadata = engines[0].metadata
        self.provider: Provider = engines[0].provider
        self.batcher = batcher
        self.expected_rate = expected_rate
        self._leases = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def __enter__(self) -> "LiveModel":
        self._leases += 1
        self._unused.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leases -= 1
        if not self._leases:
            self._unused.set()

    async def retire(self) -> None:
        """Wait for the last lease, serve queued requests, and free the engines."""
        await self._unused.wait()
        await self.batcher.drain()
        await self.batcher.close()
        logger.info("version %d: retired", self.version)


@dataclass
class VersionRecord:
    """A version folder as of the last scan, and its state.

    Attributes:
        fingerprint: of the served files.
        serving: whether it is live.
        reason: why it was refused, with full paths, for the log; "" if it was not.
        read_error: why its metadata could not be read the last time; "" if they could. It shows as refused in
            `GET /models`, and is still tried as a candidate.
        metadata: None until they are read.
    """

    version: ModelVersion
    fingerprint: Fingerprint
    serving: bool = False
    reason: str = ""
    read_error: str = ""
    metadata: ModelMetadata | None = None

    def matches(self, fingerprint: Fingerprint) -> bool:
        """Return whether the files are unchanged. Their ctime counts for a refused version, since rights may be why."""
        if self.reason:
            return fingerprint == self.fingerprint
        return [file[:3] for file in fingerprint] == [file[:3] for file in self.fingerprint]

    @property
    def number(self) -> int:
        """The number of its folder."""
        return self.version.number

    @property
    def state(self) -> Literal["live", "available", "refused"]:
        """The state as `GET /models` shows it; "available" is lower than the live one, or not the pinned one."""
        return "live" if self.serving else "refused" if self.reason or self.read_error else "available"

    @property
    def public_reason(self) -> str:
        """Why it is refused, without paths, see `without_folders`; "" if it is not."""
        if self.state != "refused":
            return ""
        return without_folders(self.reason or self.read_error, self.version.path.parent)

    def describe(self, settings: Settings, provider: Provider) -> None:
        """Read the metadata of an untried version, or record why that fails."""
        if self.metadata is None and not self.reason:
            before, self.read_error = self.read_error, ""
            try:
                self.metadata = read_metadata(choose_file(self.version.path, provider, settings.precision))
            except (ArtifactError, EngineError) as error:
                self.reason = str(error)
            except OSError as error:  # missing rights, or a network disk is gone for a moment
                self.read_error = str(error)
            if (self.reason or self.read_error) not in ("", before):
                logger.error("version %d: can't be read: %s", self.version.number, self.reason or self.read_error)


def without_folders(reason: str, model_folder: Path) -> str:
    """Remove absolute paths from `reason`, since `GET /models` may be open to all.

    A file in the model folder keeps its path within it, any other file its name alone.
    """
    for folder in (model_folder.resolve(), model_folder.absolute(), model_folder):
        reason = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", reason)
    return ABSOLUTE_PATH.sub(r"\1", reason)


def scan(folder: Path) -> list[tuple[ModelVersion, Fingerprint]]:
    """List the versions in `folder` with their fingerprints, ascending.

    Raises:
        OSError: the folder, or a version in it, can't be read for a reason that may pass.
    """
    return [(version, _fingerprint(version.path)) for version in list_versions(folder)]


def _fingerprint(folder: Path) -> Fingerprint:
    files = []
    # A folder that is being removed, may not be read or links to itself has a fingerprint of what is left. Other
    # errors may pass, and must not look like a change.
    try:
        for file in folder.iterdir():
            if file.name in SERVED_FILES:
                status = file.stat()
                files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except OSError as error:
        if error.errno not in PERMANENT_ERRNOS:
            raise
    return tuple(sorted(files))


def open_engines(folder: Path, settings: Settings) -> list[Engine]:
    """Open a version on every GPU of `settings`, or with several engines on the CPU.

    Raises:
        EngineError, ArtifactError: as `OnnxEngine`.
    """
    provider = resolve_provider(settings.provider, settings.device_ids[0])
    path = choose_file(folder, provider, settings.precision)
    common: dict[str, Any] = {
        "provider": provider,
        "max_batch_size": settings.max_batch_size,
        "intra_op_threads": settings.intra_op_threads,
        "gpu_memory_limit_bytes": settings.gpu_memory_limit_bytes,
        "cuda_graphs": settings.cuda_graphs,
        "tune_batch_size": settings.tune_batch_size,
    }
    on_gpus = [{"device_id": device_id} for device_id in settings.device_ids]
    engines: list[Engine] = []
    with ExitStack() as opened:
        for arguments in on_gpus if provider != "cpu" else engines_of_cpu(settings):
            engine = OnnxEngine(path, **(common | arguments))
            opened.callback(engine.close)
            engines.append(engine)
        opened.pop_all()
    return engines


def engines_of_cpu(settings: Settings) -> list[dict[str, Any]]:
    """Return the arguments of each `OnnxEngine` on the CPU that differ from the common ones.

    The threads of one run wait for each other after every product; runs of one thread each never wait. So engines
    that run at once share the cores. One more engine uses all cores, for an image that comes while nothing else runs.

    The default is one engine a core, at most `MAX_CPU_ENGINES` since each takes memory; one if `intra_op_threads` is
    set.
    """
    cores, threads = max(1, usable_cores() // settings.workers), settings.intra_op_threads
    count = settings.cpu_engines or (1 if threads else min(cores, MAX_CPU_ENGINES))
    if count == 1:
        return [{} if threads or settings.workers == 1 else {"intra_op_threads": cores}]
    engines: list[dict[str, Any]] = [{"intra_op_threads": threads or max(1, cores // count)}] * count
    if threads or cores == 1:
        return engines
    return [*engines, {"max_batch_size": 1, "tune_batch_size": False, "runs_alone": True}]


async def open_in_thread(open_them: Callable[[], Sequence[Engine]]) -> Sequence[Engine]:
    """Open engines in a thread; if this is cancelled, the thread closes them when they are open."""
    is_late = threading.Event()

    def job() -> Sequence[Engine]:
        engines = open_them()
        if is_late.is_set():
            for engine in engines:
                engine.close()
        return engines

    try:
        return await run_in_thread(job)
    except asyncio.CancelledError:
        is_late.set()
        raise
