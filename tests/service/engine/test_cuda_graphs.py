"""A model whose CUDA graphs can't be captured runs without, on a device that is made of NumPy."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine import cuda_probe as device_module
from service.engine import onnx_engine as engine_module
from service.engine.cuda import RUNS_UNTIL_CAPTURED, BucketRunner
from service.engine.metadata import ModelMetadata
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import Outputs
from service.engine.session import EngineError, SessionSpec, open_session
from tests.fakes import tiny_images, tiny_logits
from tests.service.engine.test_cuda import FakeBound


class FakeCuda:
    """Sessions on a device on which CUDA graphs fail: when they are asked for, when one is captured, or always.

    Attributes:
        without_memory: sizes whose capture there is no memory for.
        opened: whether each session was opened with graphs.
        runners: those that were made.
        held: of them, how many were still there when each session was opened.
    """

    def __init__(self, fails_at: str, without_memory: tuple[int, ...] = ()) -> None:
        self.fails_at = fails_at
        self.without_memory = without_memory
        self.opened: list[bool] = []
        self.runs: list[int] = []
        self.runners: list[weakref.ref[BucketRunner]] = []
        self.held: list[int] = []

    def open(self, path: Path, spec: SessionSpec) -> Any:
        self.held.append(sum(runner() is not None for runner in self.runners))
        self.opened.append(spec.cuda_graphs)
        if self.fails_at == "always" or (spec.cuda_graphs and self.fails_at == "opening"):
            raise EngineError("This session cannot use the graph capture feature as requested by the user")
        return open_session(path, SessionSpec("cpu", intra_op_threads=1))

    def runner(self, session: Any, metadata: ModelMetadata, sizes: list[int], spec: SessionSpec) -> BucketRunner:
        captures, without_memory = spec.cuda_graphs, self.without_memory
        fails = self.fails_at == "capture"

        class Bound(FakeBound):
            def run(self) -> Outputs:
                if captures and len(self.images) in without_memory:
                    raise RuntimeError("CUDA failure 2: out of memory")
                if captures and fails:
                    raise RuntimeError("CUDA error 901: operation failed due to a previous error during capture")
                return super().run()

        runner = BucketRunner(lambda size: Bound(size, lambda: 1000, self.runs), sizes, RUNS_UNTIL_CAPTURED)
        self.runners.append(weakref.ref(runner))
        return runner


def on_cuda(monkeypatch: pytest.MonkeyPatch, fails_at: str, without_memory: tuple[int, ...] = ()) -> FakeCuda:
    fake = FakeCuda(fails_at, without_memory)
    monkeypatch.setattr(engine_module, "resolve_provider", lambda choice, device_id: "cuda")
    monkeypatch.setattr(engine_module, "why_no_graphs", lambda: None)
    monkeypatch.setattr(engine_module, "open_cuda_session", fake.open)
    monkeypatch.setattr(engine_module, "cuda_runner", fake.runner)
    return fake


@pytest.mark.parametrize("fails_at", ["opening", "capture"])
def test_where_graphs_can_not_be_captured_kernels_are_launched_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path, fails_at: str
) -> None:
    fake = on_cuda(monkeypatch, fails_at)
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=4)
    engine.warm_up()
    assert fake.opened == [True, False]
    assert fake.held == [0, 0]  # what could not be captured has given its memory back
    assert fake.runs == [4, 4, 2, 2, 1, 1]
    assert caplog.text.count("no CUDA graphs") == 1
    assert engine.without_graphs is not None
    images = tiny_images(3)
    np.testing.assert_array_equal(engine.run(images), tiny_logits(images, 1))


def test_why_there_are_no_graphs_is_said_before_anything_is_freed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    """On a device that has gone onnxruntime aborts the process then."""
    fake = on_cuda(monkeypatch, "capture")
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=4)
    (runner,) = fake.runners
    messages: list[str] = []
    weakref.finalize(runner(), lambda: messages.append(caplog.text))
    engine.warm_up()
    assert ["operation failed due to a previous error during capture" in text for text in messages] == [True]


def test_a_small_batch_without_memory_for_its_graph_is_padded_to_one_that_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    fake = on_cuda(monkeypatch, "never", without_memory=(2, 1))
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=8)
    engine.warm_up()
    assert fake.opened == [True]
    assert engine.without_graphs is None
    assert engine.max_batch_size == 8
    assert "no memory for batches of 2 alone; the next size takes them" in caplog.text
    fake.runs.clear()
    for n in (8, 3, 2, 1):
        images = tiny_images(n)
        np.testing.assert_array_equal(engine.run(images), tiny_logits(images, 1))
    assert fake.runs == [8, 4, 4, 4]


def test_without_graphs_the_largest_batch_is_tried_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    on_cuda(monkeypatch, "capture", without_memory=(8,))
    engine = OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=8)
    engine.warm_up()
    assert engine.max_batch_size == 8
    assert len(engine.run(tiny_images(8))) == 8


def test_an_engine_that_fails_without_graphs_too_raises(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for graphs, opened in ((True, [True, False]), (False, [False])):
        fake = on_cuda(monkeypatch, "always")
        with pytest.raises(EngineError, match="graph capture"):
            OnnxEngine(folder / "model.onnx", provider="cuda", cuda_graphs=graphs)
        assert fake.opened == opened


def test_a_cudnn_that_does_not_keep_the_code_of_graphs_gets_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    """As torch's is, which an export on a GPU host loads."""
    fake = on_cuda(monkeypatch, "never")
    monkeypatch.setattr(engine_module, "why_no_graphs", device_module.why_no_graphs)
    versions = iter([(9, 20, 0), (9, 28, 1)])
    monkeypatch.setattr(device_module, "cudnn_version", lambda: next(versions))
    for _ in range(2):
        OnnxEngine(folder / "model.onnx", provider="cuda", max_batch_size=4)
    assert fake.opened == [False, True]
    assert caplog.text.count("no CUDA graphs") == 1
    assert "cuDNN must be 9.28.0 or newer to keep the code of a captured graph, and is 9.20.0" in caplog.text
