"""The CUDA probe: tries package, driver, libraries and GPU, and says what fails."""

import contextlib
import ctypes
import io
import logging

import numpy as np
import onnxruntime as ort

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CUDNN = "libcudnn.so.9"
# A captured graph calls the code that cuDNN compiled for its convolution. Since 9.28 cuDNN keeps it while the graph
# lives; before, it goes with the plan, and onnxruntime keeps only the plan of the last batch size.
KEEPS_CODE_OF_GRAPHS = (9, 28, 0)
# Each replay copies the address lists of batched products from host memory. Since 1.30 onnxruntime keeps that memory;
# before, the next batch size overwrites it and breaks earlier graphs (onnxruntime's pull request 32121).
KEEPS_LISTS_OF_GRAPHS = (1, 30)

# A model of one node, as bytes since the service has no `onnx`: y = Cast(x), uint8 [1] to float32 [1].
PROBE = (
    b'\x08\x08:B\n\x17\n\x01x\x12\x01y"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02\x12\x05probe'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x02\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"B\x04\n\x00\x10\r"
)

_working_devices: set[int] = set()  # not probed again: a probe would spoil a capture


def why_no_cuda(device_id: int = 0) -> str | None:
    """Return why CUDA can't be used on this GPU; None if it can. Allocates and runs a model on it.

    `onnxruntime.get_available_providers()` lists only what the package was built with.
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
        if cudnn_version() is None:  # onnxruntime would fail only at the first convolution
            raise OSError(f"cuDNN 9 ({CUDNN}) is missing.")
        # Allocating one byte loads the provider and its libraries. A kernel runs only if onnxruntime was built for the
        # GPU's architecture.
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", device_id)
        device = [(CUDA, {"device_id": str(device_id)})]
        ort.InferenceSession(PROBE, providers=device, enable_fallback=0).run(None, {"x": np.zeros(1, np.uint8)})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        logger.warning("an NVIDIA driver is there, but CUDA does not work: %s %s", error, complaints)
        return f"CUDA device {device_id} can't be used: {error} {complaints}".strip()
    _working_devices.add(device_id)
    return None


def cudnn_version() -> tuple[int, int, int] | None:
    """Return major, minor and patch of the cuDNN that is or would be loaded; None if there is none."""
    try:
        library = ctypes.CDLL(CUDNN)
    except OSError:
        return None
    major, rest = divmod(library.cudnnGetVersion(), 10_000)
    return major, *divmod(rest, 100)


def why_no_graphs() -> str | None:
    """Return why captured graphs can't be trusted; None if they can. Call `why_no_cuda` first."""
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
    """Load CUDA and cuDNN from their PyPI wheels, if installed; return onnxruntime's complaints."""
    printed = io.StringIO()  # onnxruntime prints them
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    return " ".join(printed.getvalue().split())
