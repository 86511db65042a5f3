"""Padding, buckets and captures, on a device that is made of NumPy. On a real one: test_gpu.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import cuda as cuda_module
from service.engine.capture_lock import CaptureLock
from service.engine.cuda import RUNS_UNTIL_CAPTURED, BucketRunner, cuda_runner, page_locked_zeros
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import Outputs, default_buckets
from service.engine.session import EngineError, SessionSpec
from tests.fakes import (
    HEIGHT,
    WIDTH,
    tiny_images,
    tiny_logits,
    tiny_metadata,
    tiny_unfamiliarity,
)


class FakeBound:
    """A bound batch that computes on the host and remembers its runs."""

    def __init__(self, size: int, limit: Callable[[], int], runs: list[int]) -> None:
        self.images = np.full((size, HEIGHT, WIDTH, 3), 77, dtype=np.uint8)  # what an earlier batch left
        self._limit = limit
        self._runs = runs

    def run(self) -> Outputs:
        self._runs.append(len(self.images))
        if len(self.images) > self._limit():
            raise RuntimeError("CUDA failure 2: out of memory")
        return Outputs(tiny_logits(self.images, 1))


class BucketedEngine(OnnxEngine):
    """An `OnnxEngine` whose batches go to fake buckets instead of a session."""

    def __init__(self, folder: Path, sizes: list[int], *, limit: int = 1000, warm_up_runs: int = 1) -> None:
        super().__init__(folder / "model.onnx", provider="cpu", max_batch_size=max(sizes), intra_op_threads=1)
        self.runs: list[int] = []
        self.limit = limit
        self._runner = BucketRunner(lambda size: FakeBound(size, lambda: self.limit, self.runs), sizes, warm_up_runs)


# Buckets


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24]), (33, [1, 2, 4, 8, 16, 32, 33])],
)
def test_default_buckets(largest: int, sizes: list[int]) -> None:
    assert default_buckets(largest) == sizes


@given(st.integers(1, 512), st.data())
def test_at_most_half_of_a_padded_batch_is_padding(largest: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, largest))
    bucket = min(size for size in default_buckets(largest) if size >= n)
    assert n <= bucket < 2 * n


def test_batches_are_padded_and_the_padding_shows_nowhere(folder: Path) -> None:
    engine = BucketedEngine(folder, [1, 2, 8])
    for n in (8, 1, 3, 2, 7, 5):
        images = tiny_images(n, seed=n)
        np.testing.assert_array_equal(engine.run(images), tiny_logits(images, 1))
    assert engine.runs == [8, 1, 8, 2, 8, 8]


def test_answers_are_not_overwritten_by_the_next_batch(folder: Path) -> None:
    engine = BucketedEngine(folder, [4])
    first = engine.run(tiny_images(3, seed=1))
    engine.run(tiny_images(3, seed=2))
    np.testing.assert_array_equal(first, tiny_logits(tiny_images(3, seed=1), 1))


def test_warm_up_goes_from_the_largest_to_the_smallest(folder: Path) -> None:
    engine = BucketedEngine(folder, [1, 2, 8], warm_up_runs=3)
    engine.warm_up()
    assert engine.runs == [8, 8, 8, 2, 2, 2, 1, 1, 1]


def test_a_bucket_without_memory_is_given_up_at_warm_up(folder: Path) -> None:
    engine = BucketedEngine(folder, [1, 2, 4, 8, 16], limit=4)
    engine.warm_up()
    assert engine.runs == [16, 8, 4, 2, 1]
    assert engine.max_batch_size == 4


def test_a_bucket_without_memory_falls_to_the_next_while_serving(folder: Path) -> None:
    engine = BucketedEngine(folder, [1, 4, 8], limit=4)
    images = tiny_images(7)
    np.testing.assert_array_equal(engine.run(images), tiny_logits(images, 1))
    assert engine.runs == [8, 4, 4]
    assert engine.max_batch_size == 4
    np.testing.assert_array_equal(engine.run(images[:2]), tiny_logits(images[:2], 1))
    assert engine.runs[3:] == [4]


def test_no_bucket_left_is_an_error(folder: Path) -> None:
    engine = BucketedEngine(folder, [2], limit=0)
    with pytest.raises(EngineError, match="not enough memory for a single image"):
        engine.run(tiny_images(1))


def test_memory_that_comes_back_serves_again(folder: Path) -> None:
    engine = BucketedEngine(folder, [1, 2, 4], limit=0)
    images = tiny_images(1)
    for _ in range(2):
        with pytest.raises(EngineError, match="there is not enough memory for a single image"):
            engine.run(images)
    engine.limit = 4
    np.testing.assert_allclose(engine.run(images), tiny_logits(images, 1), atol=1e-5)
    np.testing.assert_allclose(engine.run(tiny_images(4)), tiny_logits(tiny_images(4), 1), atol=1e-5)


# Captures


class FakeOrtValue:
    """A device buffer: a copy, so that nothing is seen that was not copied in."""

    def __init__(self, shape: tuple[int, ...], dtype: type, device: str, device_id: int) -> None:
        self.array = np.zeros(shape, dtype)
        self.device = (device, device_id)

    ortvalue_from_shape_and_type = classmethod(lambda cls, *arguments: cls(*arguments))

    def update_inplace(self, array: np.ndarray) -> None:
        assert array.shape == self.array.shape
        assert array.flags.c_contiguous
        self.array[:] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def brightness(images: np.ndarray) -> np.ndarray:
    return images.mean(axis=(1, 2, 3), dtype=np.float32)


class FakeRunOptions(dict[str, str]):
    add_run_config_entry = dict.__setitem__


class FakeSession:
    """A session on a device: each run records its graph and whether it was alone."""

    def __init__(self, lock: CaptureLock) -> None:
        self.lock = lock
        self.graphs: list[str] = []
        self.alone: list[bool] = []
        self.devices: list[int] = []
        self.device: Callable[[], int] = lambda: 0
        self.bindings = 0
        self.outputs: dict[str, FakeOrtValue] = {}

    def io_binding(self) -> Self:
        self.bindings += 1
        return FakeSession(self.lock)

    def bind_ortvalue_input(self, name: str, value: FakeOrtValue) -> None:
        assert name == "images"
        self.input = value

    def bind_ortvalue_output(self, name: str, value: FakeOrtValue) -> None:
        self.outputs[name] = value

    def run_with_iobinding(self, binding: Self, options: FakeRunOptions) -> None:
        self.graphs.append(options["gpu_graph_id"])
        self.alone.append(self.lock._capturing)
        self.devices.append(self.device())
        images = binding.input.array
        for name, value in binding.outputs.items():
            value.array[:] = {"logits": tiny_logits(images, 1), "unfamiliarity": brightness(images)}[name]


@pytest.fixture
def fake_ort(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    class FakeOrt:
        OrtValue = FakeOrtValue
        RunOptions = FakeRunOptions
        cuda_version = "0.0"  # there is no libcudart.so.0, so host buffers are ordinary ones

    monkeypatch.setattr(cuda_module, "ort", FakeOrt)
    return FakeSession(cuda_module.capture_lock)


def test_each_batch_size_has_its_buffers_and_its_graph(fake_ort: FakeSession) -> None:
    runner = cuda_runner(fake_ort, tiny_metadata(), [1, 2, 4], SessionSpec("cuda", device_id=1, cuda_graphs=True))
    assert fake_ort.bindings == 3
    for n in (4, 1, 3, 2, 4):
        images = tiny_images(n, seed=n)
        np.testing.assert_array_equal(runner.run(images).logits, tiny_logits(images, 1))
    # The first run of each is none that is captured.
    assert fake_ort.graphs == ["-1", "-1", "4", "-1", "4"]
    assert fake_ort.bindings == 3  # nothing is bound anew


def test_the_unfamiliarity_is_bound_as_the_logits_are(fake_ort: FakeSession) -> None:
    metadata = tiny_metadata(unfamiliarity=tiny_unfamiliarity(3))
    runner = cuda_runner(fake_ort, metadata, [1, 4], SessionSpec("cuda", cuda_graphs=True))
    for n in (4, 1, 3, 3):
        images = tiny_images(n, seed=n)
        outputs = runner.run(images)
        np.testing.assert_array_equal(outputs.logits, tiny_logits(images, 1))
        np.testing.assert_array_equal(outputs.unfamiliarity, brightness(images))
    assert fake_ort.graphs == ["-1", "-1", "4", "4"]


def test_runs_that_capture_are_alone_and_later_ones_are_not(fake_ort: FakeSession) -> None:
    runner = cuda_runner(fake_ort, tiny_metadata(), [2], SessionSpec("cuda", cuda_graphs=True))
    assert runner.warm_up_runs == RUNS_UNTIL_CAPTURED
    for _ in range(RUNS_UNTIL_CAPTURED + 2):
        runner.run(tiny_images(2))
    assert fake_ort.graphs == ["-1", "2", "2", "2"]
    assert fake_ort.alone == [False, True, False, False]


def test_host_buffers_are_ordinary_memory_where_the_cuda_runtime_is_not(
    fake_ort: FakeSession, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        array = page_locked_zeros((2, HEIGHT, WIDTH, 3))
    assert (array.shape, array.dtype, array.any()) == ((2, HEIGHT, WIDTH, 3), np.uint8, False)
    assert "not page-locked" in caplog.text


def test_without_graphs_no_run_has_to_be_alone(fake_ort: FakeSession) -> None:
    runner = cuda_runner(fake_ort, tiny_metadata(), [2], SessionSpec("cuda"))
    assert runner.warm_up_runs == 1
    runner.run(tiny_images(2))
    assert fake_ort.alone == [False]


def test_features_run_beside_the_graphs_and_the_bound_buffers(fake_ort: FakeSession) -> None:
    asked: list[tuple[list[str], str]] = []

    def run(names: list[str], feeds: dict[str, np.ndarray], options: FakeRunOptions) -> list[np.ndarray]:
        asked.append((names, options["gpu_graph_id"]))
        logits = tiny_logits(feeds["images"], 1)
        return [logits, logits * 2]

    fake_ort.run = run
    runner = cuda_runner(fake_ort, tiny_metadata(), [1, 2, 4], SessionSpec("cuda", cuda_graphs=True))
    logits, _, features = runner.run(tiny_images(3), with_features=True)
    np.testing.assert_array_equal(logits * 2, features)
    assert asked == [(["logits", "features"], "-1")]
    assert fake_ort.graphs == []
