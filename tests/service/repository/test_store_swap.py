"""One version takes over from another while requests are under way."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.engine.onnx_engine import Engine
from service.errors import Draining, InferenceFailed
from service.repository import store as store_module
from service.repository.store import ModelStore, NoUsableVersionError
from service.settings import Settings
from tests.fakes import FakeEngine, image, make_model_folder, tiny_images, tiny_logits
from tests.service.batchers import classify, failure_of
from tests.service.stores import AnyGolden, FakeOpener, Make, Opener, StoreRecorder, assert_serves, store_settings


async def test_loading_happens_beside_the_event_loop(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    opener.may_open.clear()
    make_model_folder(tmp_path, 2)
    reloading = asyncio.create_task(store.reload())
    while opener.opened != [1, 2]:
        await assert_serves(store, 1)
    await assert_serves(store, 1)
    assert not reloading.done()
    assert opener.thread != threading.get_ident()
    opener.may_open.set()
    await reloading
    await assert_serves(store, 2)


async def test_a_request_keeps_its_model_from_decode_to_answer(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    with store.lease() as first, store.lease() as second:
        make_model_folder(tmp_path, 2)
        await store.reload()
        assert first is second is not store.live
        await asyncio.sleep(0.02)  # time enough for a batcher to be closed too early
        assert not opener.engines[1].closed
        assert (await classify(first.batcher, image(5))).logits[:2].tolist() == [5, 1]
        with store.lease() as new:
            assert (await classify(new.batcher, image(5))).logits[:2].tolist() == [5, 2]
    assert await asyncio.to_thread(opener.engines[1].closing.wait, 5)


async def test_requests_queued_without_a_lease_are_served(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    opener.engines[1].hold()
    batcher = store.lease().batcher
    queued = [asyncio.create_task(classify(batcher, image(number))) for number in range(6)]
    await asyncio.sleep(0)
    make_model_folder(tmp_path, 2)
    await store.reload()
    await asyncio.sleep(0)
    opener.engines[1].let_go()
    assert [(await task).logits[:2].tolist() for task in queued] == [[number, 1] for number in range(6)]


async def test_fifty_swaps_under_load_fail_no_request_and_mix_no_answers(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    hidden, shown = tmp_path / ".2", tmp_path / "2"
    make_model_folder(tmp_path, 2).rename(hidden)
    store = make()
    await store.load()
    expected = {version: tiny_logits(tiny_images(50, seed=7), version) for version in (1, 2)}
    images = tiny_images(50, seed=7)
    answers = {1: 0, 2: 0}
    answered = asyncio.Event()  # by the version that is live
    stop = False

    async def client(index: int) -> None:
        while not stop:
            index = (index + 1) % 50
            with store.lease() as live:
                await asyncio.sleep(0)  # a decode, during which the model may be swapped
                prediction = await classify(live.batcher, images[index])
            np.testing.assert_allclose(prediction.logits, expected[live.version][index], atol=1e-4)
            answers[live.version] += 1
            if live is store.live:
                answered.set()

    clients = [asyncio.create_task(client(index)) for index in range(8)]
    for swap in range(50):
        hidden.rename(shown) if swap % 2 == 0 else shown.rename(hidden)
        await store.reload()
        assert store.live is not None
        assert store.live.version == 2 - swap % 2
        answered.clear()
        await asyncio.wait_for(answered.wait(), 5)
    stop = True
    await asyncio.gather(*clients)
    assert min(answers.values()) >= 25


async def test_closing_serves_the_queue_of_the_old_model_too(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    opener.engines[1].hold()
    lease = store.lease()
    with lease:
        old = [asyncio.create_task(classify(lease.batcher, image(number))) for number in range(9)]
        await asyncio.sleep(0)
        make_model_folder(tmp_path, 2)
        await store.reload()
        new = asyncio.create_task(classify(store.lease().batcher, image(9)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(store.close())
        await new
        assert not any(task.done() for task in old)
        opener.engines[1].let_go()
        await closing
    predictions = [await task for task in [*old, new]]
    assert [prediction.logits[:2].tolist() for prediction in predictions] == [
        *([number, 1] for number in range(9)),
        [9, 2],
    ]
    assert opener.engines[1].closed
    assert opener.engines[2].closed


async def test_closing_waits_for_no_request_that_holds_an_old_model(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    with store.lease() as old:
        make_model_folder(tmp_path, 2)
        await store.reload()
        (retiring,) = (task for task in asyncio.all_tasks() if task.get_name() == "retire-1")
        async with asyncio.timeout(5):
            await store.close()
            await asyncio.wait([retiring])  # it would wait for the lease, and the loop's end for it
        assert retiring.cancelled()
        assert opener.engines[1].closed
        assert opener.engines[2].closed
        with pytest.raises(Draining):
            await classify(old.batcher, image(1))


async def test_an_engine_that_hangs_fails_the_store(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 3)
    opener = FakeOpener()
    store = ModelStore(store_settings(tmp_path, run_timeout_ms=20), StoreRecorder(), open_engines=opener)
    await store.load()
    opener.engines[3].hold()
    with store.lease() as live:
        lost = asyncio.create_task(classify(live.batcher, image(1)))
    await failure_of(store)
    assert store.failure.startswith("version 3: engine-0: a batch of 1 did not end")
    await asyncio.wait([lost])
    assert lost.exception() is not None
    await store.close()
    opener.engines[3].let_go()


async def test_on_a_device_that_has_gone_nothing_is_freed(tmp_path: Path) -> None:
    """There onnxruntime's destructors throw, which aborts the process."""
    make_model_folder(tmp_path, 3)
    opener = FakeOpener()
    store = ModelStore(store_settings(tmp_path), StoreRecorder(), open_engines=opener)
    await store.load()
    opener.engines[3].fail = lambda batch: RuntimeError("CUDA failure 700: an illegal memory access was encountered")
    with store.lease() as live:
        while not store.failure:
            with pytest.raises(InferenceFailed):
                await classify(live.batcher, image(1))
    assert "batches failed in a row" in store.failure
    await store.close()
    assert not opener.engines[3].closed


# A load that does not end


async def closed(engine: FakeEngine) -> None:
    """Wait until it is, in its thread."""
    async with asyncio.timeout(5):
        while not engine.closed:  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.01)


async def test_a_version_that_takes_too_long_to_warm_up_is_refused_and_closed_when_it_comes_to_an_end(
    tmp_path: Path,
) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = ModelStore(store_settings(tmp_path, load_timeout_s=1), StoreRecorder(), open_engines=opener)
    await store.load()
    opener.held = True
    make_model_folder(tmp_path, 2)
    await store.reload()
    (_, refused) = store.versions()
    assert (refused.state, refused.public_reason) == ("refused", "2: was not loaded, warm and checked within 1 s")
    assert store.lease().version == 1
    hung = opener.engines[2]
    assert not hung.closed
    hung.let_go()
    await closed(hung)
    await store.close()


async def test_a_version_that_takes_too_long_to_open_is_refused_and_closed_when_it_is(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    may_open = threading.Event()
    engine = AnyGolden(tag=1)

    def open_late(folder: Path, settings: Settings) -> Sequence[Engine]:
        assert may_open.wait(5)
        return [engine]

    store = ModelStore(store_settings(tmp_path, load_timeout_s=0.2), StoreRecorder(), open_engines=open_late)
    with pytest.raises(NoUsableVersionError, match=r"not loaded, warm and checked within 0\.2 s"):
        await store.load()
    may_open.set()
    await closed(engine)
    await store.close()


async def test_a_disks_own_timeout_is_reported_as_such(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)

    def gone(folder: Path, settings: Settings) -> Sequence[Engine]:
        raise TimeoutError(110, "Connection timed out", str(folder))

    store = ModelStore(store_settings(tmp_path), StoreRecorder(), open_engines=gone)
    with pytest.raises(NoUsableVersionError, match="Connection timed out"):
        await store.load()


async def test_golden_images_that_can_not_be_read_in_time_refuse_the_version_and_block_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path, 1)
    store = ModelStore(store_settings(tmp_path, load_timeout_s=1), StoreRecorder(), open_engines=FakeOpener())
    await store.load()
    make_model_folder(tmp_path, 2)
    is_back = threading.Event()  # a disk far away: reading from it does not end
    monkeypatch.setattr(store_module, "load_golden", lambda path: is_back.wait(30))
    async with asyncio.timeout(10):
        await store.reload()
    (live, refused) = store.versions()
    assert (live.state, refused.public_reason) == ("live", "2: was not loaded, warm and checked within 1 s")
    threads = [thread for thread in threading.enumerate() if thread.name == "background"]
    assert threads
    assert all(thread.daemon for thread in threads)  # or the process could not end
    is_back.set()
    await store.close()
