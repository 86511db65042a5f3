from pathlib import Path

import pytest

from service.engine import session as session_module
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import (
    EngineError,
    ProviderChoice,
    SessionSpec,
    open_session,
    provider_options,
    resolve_provider,
)
from tests.fakes import HEIGHT, WIDTH, tiny_metadata


def without_cuda(device_id: int = 0) -> str | None:
    return "there is no NVIDIA driver"


def with_cuda(device_id: int = 0) -> str | None:
    return None


@pytest.mark.parametrize("choice", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_refused_with_a_reason(
    choice: ProviderChoice, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "why_no_cuda", without_cuda)
    with pytest.raises(EngineError, match=f"provider {choice} was asked for .* no NVIDIA driver.*'auto'"):
        OnnxEngine(folder / "model.onnx", provider=choice)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In onnxruntime's words, which end with a full stop."""
    words = "CUDA device 7 can't be used: The provided device id doesn't match any available GPUs on the machine."
    monkeypatch.setattr(session_module, "why_no_cuda", lambda device_id: words)
    with pytest.raises(EngineError) as raised:
        resolve_provider("cuda", 7)
    assert str(raised.value) == (
        f"provider cuda was asked for and can't run here: {words} It needs the extra 'gpu' and a host with an NVIDIA "
        "driver and the device 7; or ask for 'cpu' or 'auto'"
    )


def test_auto_takes_the_cpu_without_a_gpu_and_logs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "why_no_cuda", without_cuda)
    with caplog.at_level("INFO"):
        assert OnnxEngine(folder / "model.onnx", provider="auto").provider == "cpu"
    assert "provider auto: the CPU will be used, since there is no NVIDIA driver" in caplog.text


def test_auto_takes_cuda_with_a_gpu_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "why_no_cuda", with_cuda)
    with caplog.at_level("INFO"):
        assert resolve_provider("auto", 1) == "cuda"
    assert "CUDA device 1 is there and will be used" in caplog.text


def test_tensorrt_needs_a_build_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "why_no_cuda", with_cuda)
    monkeypatch.setattr(session_module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert resolve_provider("cuda") == "cuda"
    with pytest.raises(EngineError, match="without TensorRT"):
        resolve_provider("tensorrt")


def test_the_error_of_an_unreadable_file_has_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(EngineError, match=r"model\.onnx: can't be read: permission denied"):
        open_session(folder / "model.onnx", SessionSpec("cpu"))


def test_a_silent_fallback_of_onnxruntime_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime warns and takes the CPU where CUDA's libraries are missing; an engine for CUDA must refuse that."""
    real = session_module.ort.InferenceSession

    def falls_back(path: Path, options: object, providers: object, **arguments: object) -> object:
        return real(path, options, ["CPUExecutionProvider"], **arguments)

    monkeypatch.setattr(session_module.ort, "InferenceSession", falls_back)
    with pytest.raises(EngineError, match="cuda was asked for, and onnxruntime took CPUExecutionProvider"):
        open_session(folder / "model.onnx", SessionSpec("cuda"))


def test_options_of_the_cuda_provider(folder: Path) -> None:
    spec = SessionSpec("cuda", device_id=3, cuda_graphs=True, gpu_memory_limit_bytes=2**30)
    (name, options), (last, _) = provider_options(folder / "model.onnx", spec)
    assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == "3"
    assert options["enable_cuda_graph"] == "1"
    assert options["gpu_mem_limit"] == str(2**30)
    assert options["use_tf32"] == "0"
    assert "gpu_mem_limit" not in provider_options(folder / "model.onnx", SessionSpec("cuda"))[0][1]


def test_tensorrt_gets_one_range_of_shapes_and_cuda_behind_it(folder: Path) -> None:
    providers = provider_options(folder / "model.onnx", SessionSpec("tensorrt", max_batch_size=16))
    assert [name for name, _ in providers] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert providers[0][1]["trt_profile_min_shapes"] == f"images:1x{HEIGHT}x{WIDTH}x3"
    assert providers[0][1]["trt_profile_max_shapes"] == f"images:16x{HEIGHT}x{WIDTH}x3"
    assert "trt_fp16_enable" not in providers[0][1]
    half = session_module.tensorrt_options(tiny_metadata(precision="float16"), SessionSpec("tensorrt"))
    assert half["trt_fp16_enable"] == "1"
