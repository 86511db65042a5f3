"""What is called of the CUDA runtime itself, on one that is made of Python. On a real one: test_gpu.py."""

import ctypes
from typing import Any

import numpy as np
import pytest

from service.engine import cuda as cuda_module
from service.engine.cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, cuda_runner, page_locked_zeros
from service.engine.runners import is_out_of_memory
from service.engine.session import SessionSpec
from tests.fakes import HEIGHT, WIDTH, tiny_images, tiny_logits, tiny_metadata
from tests.service.engine.test_cuda import FakeOrtValue, FakeSession, fake_ort

__all__ = ["fake_ort"]


class FakeRuntime:
    """libcudart, as far as it is called; knows the device of the one thread that calls it."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.calls: list[str] = []
        self.device = 0
        self.error = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> int:
        self.calls.append(name)
        if name == "cudaGetLastError":
            error, self.error = self.error, 0
            return error
        if name == "cudaSetDevice":
            self.device = arguments[0].value
        if name == "cudaGetErrorString":
            return b"out of memory" if arguments[0] == 2 else b"another"
        if name == "cudaMemcpy" and not self.statuses.get(name):
            target, source, size, self.kind = (argument.value for argument in arguments)
            ctypes.memmove(target, source, size)
        self.error = self.statuses.get(name, 0) or self.error
        return self.statuses.get(name, 0)


def test_an_error_of_the_runtime_is_cleared_before_the_next_kernel(
    fake_ort: FakeSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime(cudaHostRegister=801)
    monkeypatch.setattr(cuda_module, "_runtime", lambda version: runtime)
    with caplog.at_level("INFO"):
        page_locked_zeros((2, HEIGHT, WIDTH, 3))
    assert "not page-locked: cudaHostRegister returned 801" in caplog.text
    assert runtime.error == 0


def test_page_locked_memory_is_given_back_with_its_array(
    fake_ort: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime(cudaHostUnregister=713)
    monkeypatch.setattr(cuda_module, "_runtime", lambda version: runtime)
    array = page_locked_zeros((2, HEIGHT, WIDTH, 3))
    assert runtime.calls == ["cudaHostRegister"]
    del array
    assert runtime.calls == ["cudaHostRegister", "cudaHostUnregister", "cudaGetLastError"]
    assert runtime.error == 0


def test_every_run_is_on_its_own_device(fake_ort: FakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(cuda_module, "_runtime", lambda version: runtime)
    runner = cuda_runner(fake_ort, tiny_metadata(), [2], SessionSpec("cuda", device_id=3))
    runtime.device = 0  # another thread's is its own
    fake_ort.device = lambda: runtime.device
    runner.run(tiny_images(2))
    assert fake_ort.devices == [3]


def test_images_and_answers_are_copied_by_the_runtime_and_not_under_the_interpreters_lock(
    fake_ort: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's copies keep it: one that hangs would hang the process, watchdog and all."""

    def keeps_the_lock(*_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FakeOrtValue, "update_inplace", keeps_the_lock)
    monkeypatch.setattr(FakeOrtValue, "numpy", keeps_the_lock)
    runtime = FakeRuntime()
    monkeypatch.setattr(cuda_module, "_runtime", lambda version: runtime)
    runner = cuda_runner(fake_ort, tiny_metadata(), [2, 4], SessionSpec("cuda"))
    for n in (1, 3, 2, 4):
        images = tiny_images(n, seed=n)
        runtime.calls.clear()
        np.testing.assert_array_equal(runner.run(images).logits, tiny_logits(images, 1))
        # The first copy is at its end before the run begins, which is on another stream.
        assert runtime.calls == ["cudaSetDevice", *["cudaMemcpy", "cudaStreamSynchronize"] * 2]
        assert runtime.kind == DEVICE_TO_HOST != HOST_TO_DEVICE


@pytest.mark.parametrize(("name", "status"), [("cudaMemcpy", 2), ("cudaStreamSynchronize", 700)])
def test_the_error_of_a_failed_copy_has_cudas_words(
    name: str, status: int, fake_ort: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime(**{name: status})
    monkeypatch.setattr(cuda_module, "_runtime", lambda version: runtime)
    runner = cuda_runner(fake_ort, tiny_metadata(), [2], SessionSpec("cuda"))
    with pytest.raises(RuntimeError, match=f"CUDA failure {status}: ") as raised:
        runner.run(tiny_images(2))
    assert is_out_of_memory(raised.value) == (status == 2)
    assert runtime.error == 0
