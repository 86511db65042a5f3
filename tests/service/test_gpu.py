"""What only a real NVIDIA GPU can show: `pytest -m gpu`."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from service.artifact import GOLDEN_FILE, load_golden
from service.cuda import page_locked_zeros
from service.engine import EngineError, OnnxEngine, check_golden
from service.session import why_no_cuda
from tests.fakes import make_model_folder, tiny_images, tiny_logits

NO_CUDA = why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA is not None, reason=f"no CUDA: {NO_CUDA}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path)


@pytest.fixture
def cuda_engine(folder: Path) -> Iterator[OnnxEngine]:
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=12)
    yield engine
    engine.close()


def test_auto_takes_the_gpu(folder: Path) -> None:
    assert OnnxEngine(folder / "model.onnx", provider="auto").provider == "cuda"


def test_every_batch_size_gives_the_same_as_numpy_captured_or_not(cuda_engine: OnnxEngine) -> None:
    cuda_engine.warm_up()
    for seed in range(3):
        for n in range(1, 13):
            images = tiny_images(n, seed=100 * seed + n)
            np.testing.assert_allclose(cuda_engine.run(images), tiny_logits(images, 1), atol=1e-3)


@pytest.mark.parametrize("graphs", [True, False])
def test_golden_pictures(graphs: bool, folder: Path) -> None:
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=4, cuda_graphs=graphs)
    engine.warm_up()
    check_golden(engine, load_golden(folder / GOLDEN_FILE))


def test_host_buffers_are_page_locked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        page_locked_zeros((8, 32, 32, 3))
    assert "not page-locked" not in caplog.text


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="99"):
        OnnxEngine(folder / "model.onnx", provider="cuda", device_id=99)


def test_one_engine_serves_while_another_captures(folder: Path, cuda_engine: OnnxEngine) -> None:
    """The two threads that a swap has: without the gate, the plain copies of one break the capture of the other."""
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
