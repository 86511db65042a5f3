"""A tiny model, and batchers and model stores that are closed when their test is over."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.batching.batcher import DynamicBatcher
from service.repository.store import ModelStore, OpenEngines
from service.repository.versions import StoreObserver, open_engines
from tests.fakes import FakeEngine, make_model_folder
from tests.service.batchers import RecordingObserver, Start
from tests.service.stores import Make, StoreRecorder, store_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of version 1 of the tiny model."""
    return make_model_folder(tmp_path)


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start batchers; at the end let their engines go and close them."""
    started: list[tuple[DynamicBatcher, tuple[FakeEngine, ...]]] = []

    def start(*engines: FakeEngine, **options: object) -> DynamicBatcher:
        batcher = DynamicBatcher(engines, **{"observer": RecordingObserver(), **options})
        batcher.start()
        started.append((batcher, engines))
        return batcher

    yield start
    for batcher, engines in started:
        for engine in engines:
            engine.let_go()
        await batcher.close()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    stores: list[ModelStore] = []

    def make(
        observer: StoreObserver | None = None, open_engines: OpenEngines = open_engines, **settings: object
    ) -> ModelStore:
        observer = observer or StoreRecorder()
        stores.append(ModelStore(store_settings(tmp_path, **settings), observer, open_engines=open_engines))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()
