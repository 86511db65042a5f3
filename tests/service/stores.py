"""What the model store's tests share: observers, openers of engines, and ways to query a store."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from service.engine.metadata import ModelMetadata
from service.engine.onnx_engine import Engine
from service.repository.store import ModelStore
from service.repository.versions import open_engines
from service.settings import Settings
from tests.fakes import FakeEngine, tiny_images, tiny_logits, tiny_metadata
from tests.service.batchers import RecordingObserver, classify


def store_settings(folder: Path, **changes: object) -> Settings:
    """Settings of a store of the tiny model; values outside their bounds are taken."""
    settings = Settings(provider="cpu", max_batch_size=4, intra_op_threads=1, tune_batch_size=False)
    return settings.model_copy(update={"model_dir": folder, **changes})


class StoreRecorder(RecordingObserver):
    """An observer of a store that records every call."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[int, str, str]] = []
        self.refused: list[tuple[int, str]] = []
        self.differences: list[float] = []
        self.swapped = asyncio.Event()

    def model_live(self, version: int, metadata: ModelMetadata, provider: str) -> None:
        self.live.append((version, metadata.name, provider))
        self.swapped.set()

    def model_refused(self, version: int, reason: str) -> None:
        self.refused.append((version, reason))

    def golden_checked(self, max_abs_difference: float) -> None:
        self.differences.append(max_abs_difference)


class Opener:
    """Opens engines as the store does, counts, and can be held."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.thread = 0
        self.may_open = threading.Event()
        self.may_open.set()

    def __call__(self, folder: Path, settings: Settings) -> Sequence[Engine]:
        self.opened.append(int(folder.name))
        self.thread = threading.get_ident()
        assert self.may_open.wait(5)
        return open_engines(folder, settings)


class FakeOpener:
    """Opens a `FakeEngine` for a version, tagged with its number; keeps it for the test."""

    def __init__(self) -> None:
        self.engines: dict[int, FakeEngine] = {}
        self.held = False  # whether what it opens hangs in its first run

    def __call__(self, folder: Path, settings: Settings) -> Sequence[Engine]:
        version = int(folder.name)
        self.engines[version] = AnyGolden(tag=version)
        if self.held:
            self.engines[version].hold()
        return [self.engines[version]]


class AnyGolden(FakeEngine):
    """A fake engine that passes any golden check, since it tolerates everything."""

    def __init__(self, *, tag: float) -> None:
        super().__init__(tag=tag)
        self.metadata = tiny_metadata(golden_tolerance=1e9)


Make = Callable[..., ModelStore]


def lines(store: ModelStore) -> list[tuple[int, str]]:
    return [(status.number, status.state) for status in store.versions()]


async def answer(store: ModelStore, seed: int = 0) -> tuple[int, np.ndarray]:
    """Classify an image as a request does; return the version and the logits."""
    with store.lease() as live:
        prediction = await classify(live.batcher, tiny_images(1, seed)[0])
        return live.version, prediction.logits


async def assert_serves(store: ModelStore, version: int) -> None:
    named, logits = await answer(store)
    assert named == version
    np.testing.assert_allclose(logits, tiny_logits(tiny_images(1), version)[0], atol=1e-4)
