"""The model store with tiny real models, and with fake engines where a test must hold them."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from service import versions as versions_module
from service.artifact import MODEL_FILE, ModelMetadata
from service.batcher import NoObserver
from service.engine import Engine, EngineError
from service.errors import NotReady
from service.models import EngineOptions, ModelStore, NoUsableVersionError, VersionStatus
from service.versions import open_engines
from tests.fakes import Defect, FakeEngine, make_model_folder, picture, tiny_images, tiny_logits, tiny_metadata

OPTIONS = EngineOptions(provider="cpu", max_batch_size=4, intra_op_threads=1)
REASONS: dict[Defect, str] = {
    "corrupt_onnx": "can't load this file",
    "empty_onnx": "can't load this file",
    "missing_onnx": "there is no model.int8.onnx or model.onnx",
    "float_input": "must be images tensor(uint8)",
    "input_name": "must be images",
    "output_name": "must be logits",
    "two_outputs": "the graph's only output must be logits",
    "fixed_batch": "of any batch",
    "no_metadata": "there is no perceiver.* entry",
    "broken_metadata": "perceiver.labels must be JSON",
    "too_few_labels": "by its metadata the output must be",
    "other_size": "by its metadata the input must be",
    "golden_missing": "this file is missing",
    "golden_corrupt": "must be an npz archive",
    "golden_pickled": "allow_pickle=False",
    "golden_mismatch": "the golden pictures give other logits on cpu",
    "golden_of_other_size": "do not belong to a model of shape",
}


class Notes(NoObserver):
    """Writes down what becomes of versions."""

    def __init__(self) -> None:
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

    def __call__(self, folder: Path, options: EngineOptions) -> Sequence[Engine]:
        self.opened.append(int(folder.name))
        self.thread = threading.get_ident()
        assert self.may_open.wait(5)
        return open_engines(folder, options)


class FakeOpener:
    """Opens a `FakeEngine` for a version, tagged with its number; keeps it for the test."""

    def __init__(self) -> None:
        self.engines: dict[int, FakeEngine] = {}

    def __call__(self, folder: Path, options: EngineOptions) -> Sequence[Engine]:
        version = int(folder.name)
        self.engines[version] = AnyGolden(tag=version)
        return [self.engines[version]]


class AnyGolden(FakeEngine):
    """A fake engine that passes any golden check, since it tolerates everything."""

    def __init__(self, *, tag: float) -> None:
        super().__init__(tag=tag)
        self.metadata = tiny_metadata(golden_tolerance=1e9)


Make = Callable[..., ModelStore]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    stores: list[ModelStore] = []

    def make(**arguments: object) -> ModelStore:
        stores.append(ModelStore(tmp_path, OPTIONS, **arguments))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


def lines(store: ModelStore) -> list[tuple[int, str]]:
    return [(status.number, status.state) for status in store.versions()]


async def answer(store: ModelStore, seed: int = 0) -> tuple[int, np.ndarray]:
    """Ask as a request does; return the version named, and the logits."""
    with store.lease() as live:
        prediction = await live.batcher.submit(tiny_images(1, seed)[0])
        return live.version, prediction.logits


async def assert_serves(store: ModelStore, version: int) -> None:
    named, logits = await answer(store)
    assert named == version
    np.testing.assert_allclose(logits, tiny_logits(tiny_images(1), version)[0], atol=1e-4)


# Which version


async def test_the_highest_version_serves(make: Make, tmp_path: Path) -> None:
    for version in (2, 10, 9):
        make_model_folder(tmp_path, version)
    store = make()
    await store.load()
    await assert_serves(store, 10)
    assert lines(store) == [(2, "available"), (9, "available"), (10, "live")]
    assert [status.metadata for status in store.versions()] == [tiny_metadata()] * 3


async def test_a_pinned_version_serves_whatever_comes(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make(pinned_version=1)
    await store.load()
    make_model_folder(tmp_path, 3)
    await store.reload()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live"), (2, "available"), (3, "available")]


async def test_a_pinned_version_that_is_not_there_is_named(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    with pytest.raises(NoUsableVersionError, match="version 7 is pinned and not there; there are: 1"):
        await make(pinned_version=7).load()


@pytest.mark.parametrize("missing", [True, False])
async def test_a_folder_without_versions_is_named(missing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    if not missing:
        folder.mkdir()
    store = ModelStore(folder, OPTIONS)
    with pytest.raises(NoUsableVersionError, match="models: there is no model version"):
        await store.load()
    with pytest.raises(NotReady):
        store.lease()
    await store.close()


async def test_if_the_highest_is_refused_at_the_start_the_next_serves(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2, defect="golden_mismatch")
    make_model_folder(tmp_path, 3, defect="corrupt_onnx")
    store = make()
    await store.load()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live"), (2, "refused"), (3, "refused")]


async def test_if_all_are_refused_each_reason_is_told(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1, defect="corrupt_onnx")
    make_model_folder(tmp_path, 2, defect="golden_missing")
    with pytest.raises(NoUsableVersionError, match=r"version 1: .*can't load this file.*; version 2: .*is missing"):
        await make().load()


async def test_the_provider_that_can_not_be_had_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(choice: str, device_id: int = 0) -> str:
        raise EngineError(f"provider {choice} was asked for and can't run here")

    monkeypatch.setattr(versions_module, "resolve_provider", refuses)
    make_model_folder(tmp_path, 1)
    with pytest.raises(NoUsableVersionError, match="provider cuda was asked for and can't run here"):
        await ModelStore(tmp_path, EngineOptions(provider="cuda")).load()


# Verification


@pytest.mark.parametrize("defect", get_args(Defect))
async def test_a_broken_version_is_refused_with_its_reason_and_the_old_one_goes_on(
    defect: Defect, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path, 1)
    notes = Notes()
    store = make(observer=notes)
    await store.load()
    make_model_folder(tmp_path, 2, defect=defect)
    old, new = await store.reload()
    assert (old.state, new.state) == ("live", "refused")
    assert REASONS[defect] in new.reason
    assert notes.refused == [(2, new.reason)]
    assert f"version 2: refused: {new.reason}" in caplog.text
    await assert_serves(store, 1)


async def test_a_refused_version_is_tried_again_only_when_its_files_change(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    broken = make_model_folder(tmp_path, 2, defect="golden_mismatch")
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    for _ in range(3):
        await store.reload()
    assert opener.opened == [2, 1]
    good = make_model_folder(tmp_path / "elsewhere", 2)
    (good / "golden.npz").replace(broken / "golden.npz")
    await store.reload()
    assert opener.opened == [2, 1, 2]
    await assert_serves(store, 2)
    assert [status.reason for status in store.versions()] == ["", ""]


async def test_the_golden_difference_is_reported_passed_or_not(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2, defect="golden_mismatch")
    notes = Notes()
    await make(observer=notes).load()
    refused, passed = notes.differences
    assert refused == pytest.approx(1, abs=1e-4)
    assert passed < 1e-4
    assert notes.live == [(1, "tiny", "cpu")]


async def test_engines_of_a_refused_version_are_closed(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    engine = FakeEngine()  # does not give the golden logits
    with pytest.raises(NoUsableVersionError, match="golden"):
        await make(open_engines=lambda folder, options: [engine]).load()
    assert engine.warmed
    assert engine.closed


async def test_a_version_is_warm_before_it_is_live(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    assert opener.engines[1].warmed
    assert sum(map(len, opener.engines[1].batches)) == 7  # the golden pictures
    assert len(opener.engines[1].threads) == 1


# Watching


async def test_a_half_written_folder_is_not_seen(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    store = make()
    await store.load()
    half = tmp_path / ".2-abc"
    half.mkdir()
    (half / MODEL_FILE).write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert [status.number for status in await store.reload()] == [1]


async def test_watching_finds_a_new_version_and_outlives_trouble(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path, 1)
    notes = Notes()
    store = make(poll_seconds=0.01, observer=notes)
    await store.load()
    troubled = asyncio.Event()

    async def trouble() -> list[VersionStatus]:
        monkeypatch.undo()
        troubled.set()
        raise OSError("the network drive is away")

    monkeypatch.setattr(store, "reload", trouble)
    watching = asyncio.create_task(store.watch())
    await asyncio.wait_for(troubled.wait(), 5)
    notes.swapped.clear()
    make_model_folder(tmp_path, 2)
    await asyncio.wait_for(notes.swapped.wait(), 5)
    watching.cancel()
    await asyncio.wait([watching])
    assert "the network drive is away" in caplog.text
    await assert_serves(store, 2)


async def test_deleting_the_highest_version_rolls_back(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make()
    await store.load()
    await assert_serves(store, 2)
    shutil.rmtree(tmp_path / "2")
    await store.reload()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live")]


@pytest.mark.parametrize("broken_left", [True, False])
async def test_a_version_whose_folder_is_gone_goes_on_if_nothing_else_passes(
    broken_left: bool, make: Make, tmp_path: Path
) -> None:
    if broken_left:
        make_model_folder(tmp_path, 1, defect="golden_mismatch")
    make_model_folder(tmp_path, 2)
    store = make()
    await store.load()
    shutil.rmtree(tmp_path / "2")
    await store.reload()
    await assert_serves(store, 2)
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


async def test_a_broken_version_that_nobody_tried_is_found_out(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1, defect="broken_metadata")
    make_model_folder(tmp_path, 2)
    store = make()
    await store.load()
    assert lines(store) == [(1, "refused"), (2, "live")]
    assert "must be JSON" in store.versions()[0].reason


# Swapping


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
        assert (await first.batcher.submit(picture(5))).logits[:2].tolist() == [5, 1]
        with store.lease() as new:
            assert (await new.batcher.submit(picture(5))).logits[:2].tolist() == [5, 2]
    assert await asyncio.to_thread(opener.engines[1].closing.wait, 5)


async def test_what_was_queued_without_a_lease_is_answered_all_the_same(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    opener.engines[1].hold()
    batcher = store.lease().batcher
    queued = [asyncio.create_task(batcher.submit(picture(number))) for number in range(6)]
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
                prediction = await live.batcher.submit(images[index])
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


async def test_closing_answers_what_is_queued_in_the_old_model_too(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    opener.engines[1].hold()
    lease = store.lease()
    with lease:
        old = [asyncio.create_task(lease.batcher.submit(picture(number))) for number in range(9)]
        await asyncio.sleep(0)
        make_model_folder(tmp_path, 2)
        await store.reload()
        new = asyncio.create_task(store.lease().batcher.submit(picture(9)))
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


async def test_an_engine_that_hangs_fails_the_store(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 3)
    opener = FakeOpener()
    options = EngineOptions(provider="cpu", run_timeout_ms=20)
    store = ModelStore(tmp_path, options, open_engines=opener)
    await store.load()
    opener.engines[3].hold()
    with store.lease() as live:
        lost = asyncio.create_task(live.batcher.submit(picture(1)))
    await asyncio.wait_for(store.failed.wait(), 5)
    assert store.failure.startswith("version 3: engine-0: a batch of 1 did not end")
    await asyncio.wait([lost])
    assert lost.exception() is not None
    await store.close()
    opener.engines[3].let_go()


# Devices


class DeviceEngine(FakeEngine):
    """An engine on a device that may not be there."""

    made: list["DeviceEngine"] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, path: Path, *, provider: str, device_id: int, **options: object) -> None:
        super().__init__()
        if device_id == 7:
            raise EngineError("CUDA device 7 can't be opened")
        self.device_id = device_id
        self.options = options
        self.made.append(self)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[DeviceEngine]:
    monkeypatch.setattr(versions_module, "resolve_provider", lambda choice, device_id: "cuda")
    monkeypatch.setattr(versions_module, "OnnxEngine", DeviceEngine)
    DeviceEngine.made.clear()
    return DeviceEngine.made


def test_each_gpu_gets_an_engine(devices: list[DeviceEngine], tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    options = EngineOptions(device_ids=(0, 2), max_batch_size=16, gpu_memory_limit_bytes=2**30, cuda_graphs=False)
    assert [engine.device_id for engine in devices] == []
    assert open_engines(folder, options) == devices
    assert [engine.device_id for engine in devices] == [0, 2]
    assert devices[0].options == {
        "max_batch_size": 16,
        "intra_op_threads": 0,
        "buckets": None,
        "gpu_memory_limit_bytes": 2**30,
        "cuda_graphs": False,
    }


def test_if_one_gpu_fails_the_engines_on_the_others_are_closed(devices: list[DeviceEngine], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="CUDA device 7"):
        open_engines(make_model_folder(tmp_path), EngineOptions(device_ids=(0, 1, 7)))
    assert [engine.closed for engine in devices] == [True, True]


def test_a_cpu_has_one_engine(tmp_path: Path) -> None:
    (engine,) = open_engines(make_model_folder(tmp_path), EngineOptions(provider="cpu", device_ids=(0, 1)))
    assert engine.provider == "cpu"
