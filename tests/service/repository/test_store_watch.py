"""The model store polls at its folder again: versions that come, go and change."""

import asyncio
import gc
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from service.engine.metadata import MODEL_FILE
from service.engine.onnx_engine import Engine
from service.engine.session import EngineError
from service.repository import store as store_module
from service.repository import versions as versions_module
from service.repository.versions import VersionRecord, open_engines
from service.settings import Settings
from tests.fakes import FakeEngine, make_model_folder, tiny_images, tiny_logits
from tests.service.stores import Make, Opener, StoreRecorder, answer, assert_serves, lines


async def test_a_half_written_folder_is_not_seen(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    store = make()
    await store.load()
    half = tmp_path / ".2-abc"
    half.mkdir()
    (half / MODEL_FILE).write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert [status.number for status in await store.reload()] == [1]


async def test_watching_finds_a_new_version_and_survives_errors(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path, 1)
    observer = StoreRecorder()
    store = make(model_poll_s=0.01, observer=observer)
    await store.load()
    has_failed = asyncio.Event()

    async def failing() -> list[VersionRecord]:
        monkeypatch.undo()
        has_failed.set()
        raise OSError("the network drive is away")

    monkeypatch.setattr(store, "reload", failing)
    watching = asyncio.create_task(store.watch())
    await asyncio.wait_for(has_failed.wait(), 5)
    observer.swapped.clear()
    make_model_folder(tmp_path, 2)
    await asyncio.wait_for(observer.swapped.wait(), 5)
    watching.cancel()
    await asyncio.wait([watching])
    assert "the network drive is away" in caplog.text
    await assert_serves(store, 2)


async def test_deleting_the_highest_version_rolls_back(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make()
    await store.load()
    await assert_serves(store, 2)
    shutil.rmtree(tmp_path / "2")
    await store.reload()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live")]
    assert "is gone" not in caplog.text


@pytest.mark.parametrize("broken_left", [True, False])
async def test_a_version_whose_folder_is_gone_serves_until_another_passes(
    broken_left: bool, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if broken_left:
        make_model_folder(tmp_path, 1, defect="golden_mismatch")
    make_model_folder(tmp_path, 2)
    store = make()
    await store.load()
    shutil.rmtree(tmp_path / "2")
    for _ in range(3):
        await store.reload()
    await assert_serves(store, 2)
    assert caplog.text.count("version 2: its folder is gone") == 1
    assert lines(store) == [(1, "refused"), (2, "live")][not broken_left :]


async def test_a_version_that_is_replaced_in_place_is_loaded_anew(make: Make, tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, 1)
    store = make()
    await store.load()
    other = make_model_folder(tmp_path / "elsewhere", 2)
    shutil.rmtree(path)
    other.rename(path)
    await store.reload()
    version, logits = await answer(store)
    assert version == 1
    np.testing.assert_allclose(logits, tiny_logits(tiny_images(1), 2)[0], atol=1e-4)


async def test_without_a_change_nothing_is_loaded_again(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    live = store.live
    await asyncio.gather(*(store.reload() for _ in range(5)))
    assert opener.opened == [2]
    assert store.live is live


async def test_a_folder_that_was_away_for_a_moment_is_not_loaded_again(make: Make, tmp_path: Path) -> None:
    folder, away = make_model_folder(tmp_path, 1), tmp_path / "away"
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    folder.rename(away)
    await store.reload()
    await assert_serves(store, 1)
    away.rename(folder)
    await store.reload()
    assert opener.opened == [1]
    assert lines(store) == [(1, "live")]


async def test_a_version_that_is_being_loaded_is_not_loaded_twice(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = Opener()
    opener.may_open.clear()
    store = make(open_engines=opener)
    reloads = [asyncio.create_task(store.reload()) for _ in range(3)]
    done, _ = await asyncio.wait(reloads, timeout=0.05)
    assert not done
    opener.may_open.set()
    await asyncio.gather(*reloads)
    assert opener.opened == [1]


async def test_an_untried_version_with_broken_metadata_is_refused(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1, defect="broken_metadata")
    make_model_folder(tmp_path, 2)
    store = make()
    await store.load()
    assert lines(store) == [(1, "refused"), (2, "live")]
    assert store.refused_versions == 0  # it would not serve anyway
    assert "must be JSON" in store.versions()[0].public_reason


async def test_the_live_version_serves_on_when_its_file_is_truncated(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    observer = StoreRecorder()
    store = make(observer=observer)
    await store.load()
    file = tmp_path / "2" / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for _ in range(3):  # and is not loaded and refused anew at every poll
        await store.reload()
    await assert_serves(store, 2)
    assert [number for number, _ in observer.refused] == [2]
    file.write_bytes(whole)
    await store.reload()
    await assert_serves(store, 2)
    assert [number for number, _, _ in observer.live] == [2, 2]


async def test_a_live_version_with_spoilt_files_counts_as_refused(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make()
    await store.load()
    (tmp_path / "2" / MODEL_FILE).write_bytes(b"half")
    await store.reload()
    assert lines(store) == [(1, "available"), (2, "live")]
    assert store.refused_versions == 1  # it would not serve after a restart


async def test_with_a_pinned_version_no_other_counts_as_refused(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2, defect="broken_metadata")
    store = make(model_version=1)
    await store.load()
    assert lines(store) == [(1, "live"), (2, "refused")]
    assert store.refused_versions == 0


async def test_other_files_in_a_version_folder_are_no_change(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    (tmp_path / "1" / "README.md").write_text("good")
    await store.reload()
    assert opener.opened == [1]


async def test_a_folder_that_can_not_be_read_is_logged_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path, 1)
    store = make(model_poll_s=0.001)
    await store.load()
    polls = 0

    def refused(folder: Path) -> list[object]:
        nonlocal polls
        polls += 1
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(store_module, "scan", refused)
    watching = asyncio.create_task(store.watch())
    async with asyncio.timeout(5):
        while polls < 4:  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.wait([watching])
    assert [record.exc_info for record in caplog.records] == [None]
    assert "can't be polled for new versions: [Errno 13] Permission denied" in caplog.text
    await assert_serves(store, 1)


async def test_an_error_that_returns_is_logged_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path, 1)
    store = make(model_poll_s=0.001)
    polls = 0
    ended = asyncio.Event()

    async def reload() -> list[VersionRecord]:
        nonlocal polls
        polls += 1
        if polls == 6:
            ended.set()
        if polls in (1, 2, 4, 5):  # twice in a row, and twice again
            raise OSError("the network drive is away")
        return []

    monkeypatch.setattr(store, "reload", reload)
    watching = asyncio.create_task(store.watch())
    await asyncio.wait_for(ended.wait(), 5)
    watching.cancel()
    await asyncio.wait([watching])
    assert len(caplog.records) == 2


async def test_a_version_that_could_not_be_read_for_a_moment_can_still_serve(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make()

    def failing(path: Path) -> object:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as away:
        away.setattr(versions_module, "read_metadata", failing)
        await store.load()
    assert lines(store) == [(1, "refused"), (2, "live")]
    shutil.rmtree(tmp_path / "2")
    await store.reload()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live")]


async def test_a_refused_version_frees_its_memory_at_once(make: Make, tmp_path: Path) -> None:
    """And does not wait for a collection: the next try, on a GPU that was full, needs that memory."""
    make_model_folder(tmp_path, 1)
    engines: list[weakref.ref[FakeEngine]] = []

    class Failing(FakeEngine):
        def warm_up(self) -> None:
            raise EngineError("there is no memory for it")

    def opened(folder: Path, settings: Settings) -> list[Engine]:
        if folder.name == "1":
            return open_engines(folder, settings)
        opened = [Failing(), FakeEngine(), FakeEngine()]
        opened[-1].runs_alone = True
        engines.extend(map(weakref.ref, opened))
        return opened

    store = make(open_engines=opened)
    await store.load()
    gc.collect()
    gc.disable()
    try:
        for version in (2, 3):
            make_model_folder(tmp_path, version)
            await store.reload()
        assert lines(store) == [(1, "live"), (2, "refused"), (3, "refused")]
        until = time.monotonic() + 5
        while any(engine() is not None for engine in engines) and time.monotonic() < until:  # noqa: ASYNC110 - threads
            await asyncio.sleep(0.01)
        assert [engine() for engine in engines] == [None] * 6
    finally:
        gc.enable()
