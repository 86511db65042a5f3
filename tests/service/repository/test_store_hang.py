"""A disk or an engine that hangs blocks neither the live version nor the next poll."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine.session import EngineError, read_metadata
from service.repository import store as store_module
from service.repository import versions as versions_module
from service.repository.store import ModelStore, NoUsableVersionError
from tests.fakes import FakeEngine, make_model_folder
from tests.service.stores import Make, StoreRecorder, assert_serves, lines, store_settings


def background_threads() -> int:
    """Number of threads that read a folder or are about to end."""
    return sum(thread.name == "background" for thread in threading.enumerate())


async def all_are_back() -> None:
    async with asyncio.timeout(10):
        while background_threads():  # noqa: ASYNC110 - threads
            await asyncio.sleep(0.01)


async def test_hanging_metadata_block_neither_the_start_nor_the_next_version(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make()
    is_back = threading.Event()

    def far_away(path: Path) -> object:
        assert path.parent.name != "1" or is_back.wait(20)
        return read_metadata(path)

    monkeypatch.setattr(versions_module, "read_metadata", far_away)
    monkeypatch.setattr(store_module, "SCAN_TIMEOUT_S", 0.1)
    async with asyncio.timeout(10):
        await store.load()
        await assert_serves(store, 2)
        make_model_folder(tmp_path, 3)
        for _ in range(4):
            await store.reload()
        await assert_serves(store, 3)
        while background_threads() > 1:  # noqa: ASYNC110 - threads that are about to end
            await asyncio.sleep(0.01)
        assert background_threads() == 1  # one thread hangs, however often the folder is polled
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
            f"{tmp_path}: the metadata of a version can't be read: no answer within 0.1 s"
        ]
        is_back.set()
        while store.versions()[0].metadata is None:
            await store.reload()
    assert lines(store) == [(1, "available"), (2, "available"), (3, "live")]


async def test_a_folder_that_hangs_is_logged_once_and_scanned_when_it_is_back(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path, 1)
    store = make(model_poll_s=0.001)
    await store.load()
    is_back, polls = threading.Event(), 0
    await all_are_back()

    def far_away(folder: Path) -> object:
        nonlocal polls
        polls += 1
        assert is_back.wait(20)
        return versions_module.scan(folder)

    monkeypatch.setattr(store_module, "scan", far_away)
    monkeypatch.setattr(store_module, "SCAN_TIMEOUT_S", 0.05)
    make_model_folder(tmp_path, 2)
    with pytest.raises(OSError, match=r"no answer within 0\.05 s"):
        await store.reload()
    watching = asyncio.create_task(store.watch())
    await asyncio.sleep(0.5)
    assert (polls, background_threads()) == (1, 1)
    assert caplog.text.count("can't be polled for new versions: [Errno 110] no answer within 0.05 s") == 1
    is_back.set()
    async with asyncio.timeout(10):
        while store.live is None or store.live.version != 2:  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.wait([watching])
    await assert_serves(store, 2)


@pytest.mark.parametrize("name", ["golden.npz", "model.onnx", "weights.bin"])
@pytest.mark.parametrize("is_linked", [True, False])
async def test_a_version_with_a_pipe_is_refused_at_once(
    make: Make, tmp_path: Path, *, name: str, is_linked: bool
) -> None:
    folder = tmp_path / "models"
    make_model_folder(folder, 1)
    store = make(model_dir=folder)
    async with asyncio.timeout(10):
        await store.load()
        path = make_model_folder(folder, 2) / name
        path.unlink(missing_ok=True)
        pipe = tmp_path / "pipe" if is_linked else path
        os.mkfifo(pipe)
        if is_linked:
            path.symlink_to(pipe)
        await store.reload()
        assert lines(store) == [(1, "live"), (2, "refused")]
        make_model_folder(folder, 3)
        await store.reload()
        await assert_serves(store, 3)


async def test_a_version_whose_files_are_links_as_in_a_config_map_is_served(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    real = make_model_folder(tmp_path, 1).rename(tmp_path / "..2026_11_30")
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "..data").symlink_to(real)
    (folder / "1" / "gone").symlink_to(tmp_path / "nowhere")
    for file in real.iterdir():
        (folder / "1" / file.name).symlink_to(Path("..data") / file.name)
    store = make(model_dir=folder)
    await store.load()
    await assert_serves(store, 1)


class WarmingEngine(FakeEngine):
    """An engine with a warm-up of the test's."""

    def __init__(self, warm_up: Callable[[], object]) -> None:
        super().__init__()
        self.warm_up = warm_up  # type: ignore[method-assign, assignment]


async def test_where_one_engine_fails_and_another_hangs_all_are_closed_when_they_come_to_an_end(tmp_path: Path) -> None:
    def fails() -> None:
        raise EngineError("no good")

    make_model_folder(tmp_path)
    may_end = threading.Event()
    engines = [WarmingEngine(fails), WarmingEngine(lambda: may_end.wait(20)), FakeEngine(), FakeEngine()]
    engines[3].runs_alone = True
    before = set(threading.enumerate())
    store = ModelStore(
        store_settings(tmp_path, load_timeout_s=0.2),
        StoreRecorder(),
        open_engines=lambda folder, options: engines,
    )
    async with asyncio.timeout(10):
        with pytest.raises(NoUsableVersionError, match=r"not loaded, warm and checked within 0\.2 s"):
            await store.load()
        may_end.set()
        while not all(engine.closed for engine in engines):  # noqa: ASYNC110 - threads
            await asyncio.sleep(0.01)
        while set(threading.enumerate()) - before:  # noqa: ASYNC110 - theirs, which end, too
            await asyncio.sleep(0.01)
    await store.close()
