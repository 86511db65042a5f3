"""Whether CUDA can be used on this host: package, driver, libraries and device, all of them really tried."""

import contextlib
import ctypes
import io
import logging

import numpy as np
import onnxruntime as ort

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CUDNN = "libcudnn.so.9"
# A captured graph calls the code that cuDNN compiled for its convolution. Since 9.28 cuDNN keeps that for as long as
# the graph lives; before, it goes with the plan, of which onnxruntime has one at a time, for the last batch size.
KEEPS_CODE_OF_GRAPHS = (9, 28, 0)
# Batched products find their operands by lists of addresses, which each replay copies again from where they lay in
# host memory at the capture. Since 1.30 onnxruntime keeps that memory; before, the next batch size writes its lists
# there, and the graphs captured earlier follow those (onnxruntime's pull request 32121).
KEEPS_LISTS_OF_GRAPHS = (1, 30)

# A model of one node: y = Cast(x), uint8 [1] to float32 [1]. A service needs no `onnx` to make it.
PROBE = (
    b'\x08\x08:B\n\x17\n\x01x\x12\x01y"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02\x12\x05probe'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x02\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"B\x04\n\x00\x10\r"
)

_working_devices: set[int] = set()  # they are not tried again, least of all while a graph is captured


def why_no_cuda(device_id: int = 0) -> str | None:
    """Say why CUDA can't be used, or None where it can: package, driver, libraries and device are all really tried.

    `onnxruntime.get_available_providers()` alone tells only what the package was built with.
    """
    if CUDA not in ort.get_available_providers():
        return "the installed onnxruntime is built without CUDA (it is in onnxruntime-gpu)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if device_id in _working_devices:
        return None
    complaints = preload_cuda_libraries()
    try:
        if cudnn_version() is None:  # onnxruntime would notice at the first convolution, with a model loaded
            raise OSError(f"cuDNN 9 ({CUDNN}) is missing.")
        # Allocating one byte loads the provider with all its libraries and touches the device. A kernel runs only where
        # onnxruntime was built for the device's architecture.
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", device_id)
        device = [(CUDA, {"device_id": str(device_id)})]
        ort.InferenceSession(PROBE, providers=device, enable_fallback=0).run(None, {"x": np.zeros(1, np.uint8)})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        logger.warning("an NVIDIA driver is there, but CUDA does not work: %s %s", error, complaints)
        return f"CUDA device {device_id} can't be used: {error} {complaints}".strip()
    _working_devices.add(device_id)
    return None


def cudnn_version() -> tuple[int, int, int] | None:
    """Return major, minor and patch of the cuDNN that is loaded, or would be; None where there is none."""
    try:
        library = ctypes.CDLL(CUDNN)
    except OSError:
        return None
    major, rest = divmod(library.cudnnGetVersion(), 10_000)
    return major, *divmod(rest, 100)


def why_no_graphs() -> str | None:
    """Say why captured graphs could not be trusted, or None where they can; to be asked after `why_no_cuda`."""
    if tuple(map(int, ort.__version__.split(".")[:2])) < KEEPS_LISTS_OF_GRAPHS:
        wanted = ".".join(map(str, KEEPS_LISTS_OF_GRAPHS))
        return f"onnxruntime must be {wanted} or newer to keep what a captured graph copies, and is {ort.__version__}"
    version = cudnn_version()
    if version is not None and version >= KEEPS_CODE_OF_GRAPHS:
        return None
    wanted = ".".join(map(str, KEEPS_CODE_OF_GRAPHS))
    loaded = "none" if version is None else ".".join(map(str, version))
    return f"cuDNN must be {wanted} or newer to keep the code of a captured graph, and is {loaded}"


def preload_cuda_libraries() -> str:
    """Load CUDA and cuDNN from their PyPI wheels, if installed; return what onnxruntime has to say about it."""
    printed = io.StringIO()  # onnxruntime prints its complaints
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    return " ".join(printed.getvalue().split())
