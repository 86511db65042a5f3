"""What only a real NVIDIA GPU can show: `pytest -m gpu`."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from service.engine.cuda import page_locked_zeros
from service.engine.cuda_probe import why_no_cuda
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import default_buckets
from service.engine.session import EngineError, SessionSpec, open_session
from service.repository.folder import GOLDEN_FILE, list_versions, load_golden
from service.repository.golden_check import check_golden
from service.repository.store import ModelStore
from service.repository.versions import open_engines
from service.settings import Settings
from tests.fakes import make_model_folder, tiny_images, tiny_logits
from tests.service.batchers import classify
from tests.service.gpu_models import make_half_folder, make_hungry_folder
from tests.service.stores import StoreRecorder, store_settings

SHIPPED = list_versions(Path(__file__).parents[3] / "models" / "perceiver-cifar100")[-1].path
MIB = 1 << 20

NO_CUDA = why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA is not None, reason=f"no CUDA: {NO_CUDA}")]


@pytest.fixture(autouse=True)
def graphs_captured(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A capture that fails is made up for by plain kernels, with the same result: only the log shows it."""
    yield
    messages = [record.getMessage() for when in ("setup", "call") for record in caplog.get_records(when)]
    assert not any("no CUDA graphs" in message for message in messages)


@pytest.fixture
def cuda_engine(folder: Path) -> Iterator[OnnxEngine]:
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=12)
    yield engine
    engine.close()


def test_auto_takes_the_gpu(folder: Path) -> None:
    assert OnnxEngine(folder / "model.onnx", provider="auto").provider == "cuda"


def test_onnxruntime_itself_says_that_it_runs_on_cuda(folder: Path) -> None:
    for spec in (SessionSpec(provider="cuda", cuda_graphs=True), SessionSpec(provider="cuda")):
        assert open_session(folder / "model.onnx", spec).get_providers()[0] == "CUDAExecutionProvider"


def test_every_batch_size_gives_the_same_as_numpy_captured_or_not(cuda_engine: OnnxEngine) -> None:
    cuda_engine.warm_up()
    for seed in range(3):
        for n in range(1, 13):
            images = tiny_images(n, seed=100 * seed + n)
            np.testing.assert_allclose(cuda_engine.run(images), tiny_logits(images, 1), atol=1e-3)


@pytest.mark.parametrize("graphs", [True, False])
def test_golden_images(graphs: bool, folder: Path) -> None:
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=4, cuda_graphs=graphs)
    engine.warm_up()
    check_golden(engine, load_golden(folder / GOLDEN_FILE))


def test_the_shipped_model_gives_its_golden_logits() -> None:
    engine = OnnxEngine(SHIPPED / "model.onnx", provider="cuda", max_batch_size=8)
    engine.warm_up()
    check_golden(engine, load_golden(SHIPPED / GOLDEN_FILE))


def test_the_captured_graph_of_each_bucket_gives_the_logits_of_plain_kernels() -> None:
    engines = [
        OnnxEngine(SHIPPED / "model.onnx", provider="cuda", max_batch_size=16, cuda_graphs=graphs)
        for graphs in (True, False)
    ]
    images = load_golden(SHIPPED / GOLDEN_FILE).images
    for engine in engines:
        engine.warm_up()
    for size in default_buckets(16):
        for turn in range(3):  # what is replayed must read the images of this run, not those of the capture
            images = np.resize(np.roll(images, turn + 1, axis=0), (size, *images.shape[1:]))
            captured, plain = (engine.run(images) for engine in engines)
            np.testing.assert_allclose(captured, plain, atol=1e-4)


def test_the_float16_file_runs_where_there_is_one(tmp_path: Path) -> None:
    version = make_half_folder(tmp_path)
    (half,) = open_engines(version, Settings(provider="auto", max_batch_size=4))
    assert (half.provider, half.metadata.precision) == ("cuda", "float16")
    half.warm_up()
    check_golden(half, load_golden(version / GOLDEN_FILE))
    (single,) = open_engines(version, Settings(provider="auto", precision="float32"))
    assert single.metadata.precision == "float32"


@pytest.mark.parametrize("warm", [True, False])
def test_a_batch_that_the_device_has_no_memory_for_is_run_in_smaller_ones(warm: bool, tmp_path: Path) -> None:
    """64 images need 1.5 GiB at once, and 1.25 GiB are allowed."""
    version = make_hungry_folder(tmp_path, 24 * MIB)
    engine = OnnxEngine(
        version / "model.onnx",
        provider="cuda",
        max_batch_size=64,
        gpu_memory_limit_bytes=1280 * MIB,
        cuda_graphs=False,
    )
    images = tiny_images(64)
    if warm:
        engine.warm_up()
    else:
        np.testing.assert_allclose(engine.run(images), tiny_logits(images, 1), atol=1e-3)
    assert engine.max_batch_size in (16, 32)  # what a library takes for its own work counts as well
    images = images[: engine.max_batch_size]
    np.testing.assert_allclose(engine.run(images), tiny_logits(images, 1), atol=1e-3)


async def test_swaps_under_load_fail_no_request_and_mix_no_answers(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    hidden, shown = tmp_path / ".2", tmp_path / "2"
    make_model_folder(tmp_path, 2).rename(hidden)
    store = ModelStore(store_settings(tmp_path, provider="cuda", max_batch_size=4), StoreRecorder())
    await store.load()
    images = tiny_images(50, seed=7)
    expected = {version: tiny_logits(images, version) for version in (1, 2)}
    answers = {1: 0, 2: 0}
    stop = False

    async def client(index: int) -> None:
        while not stop:
            index = (index + 1) % 50
            with store.lease() as live:
                assert live.provider == "cuda"
                prediction = await classify(live.batcher, images[index])
            np.testing.assert_allclose(prediction.logits, expected[live.version][index], atol=1e-3)
            answers[live.version] += 1

    clients = [asyncio.create_task(client(index)) for index in range(8)]
    for swap in range(10):
        hidden.rename(shown) if swap % 2 == 0 else shown.rename(hidden)
        await store.reload()
        assert store.live is not None
        assert store.live.version == 2 - swap % 2
        before = sum(answers.values())
        while sum(answers.values()) < before + 20:
            await asyncio.sleep(0.001)
            for ended in [client for client in clients if client.done()]:
                await ended  # it has failed
    stop = True
    await asyncio.gather(*clients)
    await store.close()


def test_host_buffers_are_page_locked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        page_locked_zeros((8, 32, 32, 3))
    assert "not page-locked" not in caplog.text


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="99"):
        OnnxEngine(folder / "model.onnx", provider="cuda", device_id=99)


def test_one_engine_serves_while_another_captures(folder: Path, cuda_engine: OnnxEngine) -> None:
    """A swap has two threads: without the capture lock, plain copies of one break the capture of the other."""
    images = tiny_images(12)
    stop = threading.Event()

    def serve() -> int:
        cuda_engine.warm_up()
        runs = 0
        while not stop.is_set() or not runs:
            np.testing.assert_allclose(cuda_engine.run(images), tiny_logits(images, 1), atol=1e-3)
            runs += 1
        return runs

    def load() -> None:
        for _ in range(5):
            engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=12)
            engine.warm_up()
            check_golden(engine, load_golden(folder / GOLDEN_FILE))
            engine.close()

    with ThreadPoolExecutor(2) as pool:
        serving, loading = pool.submit(serve), pool.submit(load)
        try:
            loading.result()
        finally:
            stop.set()
        assert serving.result() > 0
