from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

from service.engine import cuda_probe as device_module
from service.engine.cuda_probe import cudnn_version, why_no_cuda, why_no_graphs


def libraries(cudnn: int | None) -> Callable[[str], SimpleNamespace]:
    """What ctypes loads: all there is, but for cuDNN where it has no version."""

    def load(name: str) -> SimpleNamespace:
        if name == "libcudnn.so.9" and cudnn is None:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return SimpleNamespace(cudnnGetVersion=lambda: cudnn)

    return load


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert why_no_cuda() == "the installed onnxruntime is built without CUDA (it is in onnxruntime-gpu)"


def test_the_probe_is_a_model_of_one_node() -> None:
    x, y = (helper.make_tensor_value_info(*one, [1]) for one in (("x", TensorProto.UINT8), ("y", TensorProto.FLOAT)))
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == device_module.PROBE
    session = device_module.ort.InferenceSession(device_module.PROBE, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([7], np.uint8)})[0].tolist() == [7.0]


@pytest.mark.parametrize(
    ("cudnn", "allocation", "kernel", "reason"),
    [
        (92801, None, None, None),
        (92000, None, None, None),
        (92801, "CUDA failure 35: driver version is insufficient", None, "driver version is insufficient"),
        (92801, None, "CUDA failure 209: no kernel image is available", "no kernel image is available"),
        (None, None, None, "cuDNN 9 (libcudnn.so.9) is missing"),
    ],
)
def test_a_device_is_tried_by_its_libraries_memory_and_a_kernel(
    cudnn: int | None,
    allocation: str | None,
    kernel: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(message: str | None) -> None:
        if message:
            raise RuntimeError(message)

    tries = []

    class Session:
        def __init__(self, model: bytes, *, providers: list[tuple[str, dict[str, str]]], enable_fallback: int) -> None:
            tries.append((providers, enable_fallback))

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> None:
            fails(kernel)

    class FakeOrt:
        InferenceSession = Session
        get_available_providers = staticmethod(lambda: ["CUDAExecutionProvider"])
        preload_dlls = staticmethod(lambda: print("no cuDNN here"))

        class OrtValue:
            ortvalue_from_shape_and_type = staticmethod(lambda *arguments: fails(allocation))

    monkeypatch.setattr(device_module, "ort", FakeOrt)
    monkeypatch.setattr(device_module.ctypes, "CDLL", libraries(cudnn))
    monkeypatch.setattr(device_module, "_working_devices", set())
    reasons = [why_no_cuda(2), why_no_cuda(2)]
    if reason is None:
        assert reasons == [None, None]
    else:
        assert all(one is not None and reason in one and "no cuDNN here" in one for one in reasons)
    once = ([("CUDAExecutionProvider", {"device_id": "2"})], 0)
    # A device that works is tried once; one that fails may have been full at the moment.
    assert tries == ([] if allocation or cudnn is None else [once] if kernel is None else [once, once])


@pytest.mark.parametrize(
    ("number", "version", "reason"),
    [
        (92801, (9, 28, 1), None),
        (92800, (9, 28, 0), None),
        (92799, (9, 27, 99), "and is 9.27.99"),
        (None, None, "and is none"),
    ],
)
def test_graphs_need_a_cudnn_that_keeps_their_code(
    number: int | None, version: tuple[int, int, int] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module.ctypes, "CDLL", libraries(number))
    assert cudnn_version() == version
    found = why_no_graphs()
    assert found is None if reason is None else found is not None and found.endswith(reason)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("1.29.0", "onnxruntime must be 1.30 or newer to keep what a captured graph copies, and is 1.29.0"),
        ("1.9.1", "onnxruntime must be 1.30 or newer to keep what a captured graph copies, and is 1.9.1"),
        ("1.30.0", None),
        ("1.32.0.dev20261101", None),
        ("2.0.0", None),
    ],
)
def test_graphs_need_an_onnxruntime_that_keeps_what_they_copy(
    version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module.ctypes, "CDLL", libraries(92801))
    monkeypatch.setattr(device_module.ort, "__version__", version)
    assert why_no_graphs() == reason
