"""Batches on an NVIDIA GPU: padded into buffers bound once for each batch size, run as captured CUDA graphs.

Shape letters: N images of a batch, B bucket size, H and W input size, C classes, D width of the features.
"""

import ctypes
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.engine.capture_lock import capture_lock
from service.engine.metadata import FEATURES_NAME, INPUT_NAME, ModelMetadata
from service.engine.runners import Images, Outputs, descending, fetch, names_of
from service.engine.session import SessionSpec, open_session

logger = logging.getLogger(__name__)

# onnxruntime does not capture a run with this graph number. The first run uses it: libraries initialise, convolutions
# choose kernels and memory is allocated, without the exclusive lock. The next run captures: onnxruntime runs twice as
# usual, captures, and replays.
NO_GRAPH = -1
RUNS_UNTIL_CAPTURED = 2

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2  # of cudaMemcpyKind


class CudaBatch:
    """One batch size of a session: host and device buffers, IO binding, and the number of its CUDA graph.

    onnxruntime keeps captured graphs by thread, so all runs must come from the engine thread.

    Attributes:
        images: uint8 [B, H, W, 3] in page-locked host memory, to be filled before a run.
    """

    def __init__(self, session: Any, metadata: ModelMetadata, images: Images, device_id: int, captures: bool) -> None:
        size = len(images)
        self.images = images
        self._input = ort.OrtValue.ortvalue_from_shape_and_type(images.shape, np.uint8, "cuda", device_id)
        self._shapes = {name: (size, *metadata.output_shapes[name]) for name in names_of(metadata)}
        self._outputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", device_id)
            for name, shape in self._shapes.items()
        }
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._input)
        for name, output in self._outputs.items():
            self._binding.bind_ortvalue_output(name, output)
        self._device_id = device_id
        self._plain, self._graph = _run_options(NO_GRAPH), _run_options(size)
        self._runs_until_captured = RUNS_UNTIL_CAPTURED if captures else 0

    def run(self) -> Outputs:
        """Copy in, run or replay, copy out, into new arrays of B rows. The session waits for the device."""
        captures = self._runs_until_captured == 1
        options = self._plain if self._runs_until_captured > 1 else self._graph
        with capture_lock.exclusive() if captures else capture_lock.shared():
            use_device(self._device_id)
            self._copy_in()
            self._session.run_with_iobinding(self._binding, options)
            self._runs_until_captured = max(0, self._runs_until_captured - 1)
            return Outputs(**{name: self._copy_out(name) for name in self._outputs})

    def _copy_in(self) -> None:
        if not copy(self._input.data_ptr(), self.images.ctypes.data, self.images.nbytes, HOST_TO_DEVICE):
            self._input.update_inplace(self.images)

    def _copy_out(self, name: str) -> NDArray[np.float32]:
        values, output = np.empty(self._shapes[name], dtype=np.float32), self._outputs[name]
        if copy(values.ctypes.data, output.data_ptr(), values.nbytes, DEVICE_TO_HOST):
            return values
        return np.asarray(output.numpy(), dtype=np.float32)


class BucketRunner:
    """Pads batches to a few sizes, each with buffers bound once.

    A captured graph needs fixed shapes and addresses, and on a GPU a padded row costs less than launching kernels
    one by one. Rows are independent, so padded rows may hold anything. Attributes as of `HostRunner`.
    """

    def __init__(
        self,
        bind: Callable[[int], CudaBatch],
        sizes: Sequence[int],
        warm_up_runs: int = 1,
        run_with_features: Callable[[Images], Outputs] | None = None,
    ) -> None:
        self.warm_up_runs = warm_up_runs
        self._run_with_features = run_with_features
        # Largest first, so that the arena allocates one block that all smaller sizes fit into.
        self.sizes: Sequence[int] = descending(sizes)
        self._bound = {size: bind(size) for size in self.sizes}

    def run(self, images: Images, *, with_features: bool = False) -> Outputs:
        """Run uint8 [N, H, W, 3], N <= sizes[0]; with features beside the bound buffers, which have none."""
        if with_features:
            assert self._run_with_features is not None
            return self._run_with_features(images)
        n = len(images)
        batch = self._bound[self._bucket(n)]
        batch.images[:n] = images
        logits, scores, _ = batch.run()
        return Outputs(logits[:n], None if scores is None else scores[:n])

    def shrink(self, failed: int) -> int:
        """Drop the bucket that failed and all above it; return the new largest, 0 if only the smallest is left.

        That one stays: another process may free its memory later, and without a bucket nothing could run then.
        """
        too_large = self._bucket(failed)
        if too_large == self.sizes[-1]:
            return 0
        for size in [size for size in self.sizes if size >= too_large]:
            del self._bound[size]
        self.sizes = descending(self._bound)
        return self.sizes[0]

    def drop(self, size: int) -> None:
        """Free the buffers of one bucket; its batches are padded to the next one."""
        del self._bound[size]
        self.sizes = descending(self._bound)

    def _bucket(self, n: int) -> int:
        return min(size for size in self.sizes if size >= n)


def _run_options(graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def open_cuda_session(path: Path, spec: SessionSpec) -> Any:
    """Open a session on CUDA or TensorRT."""
    with capture_lock.shared():
        return open_session(path, spec)


def cuda_runner(session: Any, metadata: ModelMetadata, sizes: Sequence[int], spec: SessionSpec) -> BucketRunner:
    """Return a runner with buffers for all batch sizes; they share one page-locked host buffer."""
    with capture_lock.shared():
        use_device(spec.device_id)
        host = page_locked_zeros((max(sizes), *metadata.input_size, 3))
        return BucketRunner(
            lambda size: CudaBatch(session, metadata, host[:size], spec.device_id, spec.cuda_graphs),
            sizes,
            warm_up_runs=RUNS_UNTIL_CAPTURED if spec.cuda_graphs else 1,
            run_with_features=lambda images: run_with_features(session, metadata, spec.device_id, images),
        )


def run_with_features(session: Any, metadata: ModelMetadata, device_id: int, images: Images) -> Outputs:
    """Run uint8 [N, H, W, 3] without bound buffers and without a graph."""
    with capture_lock.shared():
        use_device(device_id)
        return fetch(session, [*names_of(metadata), FEATURES_NAME], images, _run_options(NO_GRAPH))


def page_locked_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Allocate page-locked zeros, uint8 of `shape`; ordinary memory, with a log line, if that fails.

    onnxruntime's Python interface allocates page-locked memory for plug-in providers only. So this registers an
    ordinary array with the CUDA runtime that onnxruntime has loaded.
    """
    array: NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)
    pointer = ctypes.c_void_p(array.ctypes.data)
    status = call_runtime("cudaHostRegister", pointer, ctypes.c_size_t(array.nbytes), ctypes.c_uint(0))
    if status == 0:
        weakref.finalize(array, call_runtime, "cudaHostUnregister", pointer)
    else:
        reason = "the CUDA runtime can't be loaded" if status is None else f"cudaHostRegister returned {status}"
        logger.info("host buffers are not page-locked: %s", reason)
    return array


def use_device(device_id: int) -> None:
    """Set this thread's GPU; otherwise its first plain copy opens a context on GPU 0."""
    call_runtime("cudaSetDevice", ctypes.c_int(device_id))


def copy(target: int, source: int, size: int, kind: int) -> bool:
    """Copy `size` bytes between host and GPU; return False if there is no CUDA runtime to do it.

    onnxruntime's own copies keep the GIL: one that hangs in the driver would block the process, watchdog included.

    Raises:
        RuntimeError: CUDA failed; the message has its error string.
    """
    status = call_runtime(
        "cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(kind)
    )
    if status == 0:  # copies from memory that is not page-locked may still run
        status = call_runtime("cudaStreamSynchronize", ctypes.c_void_p(0))
    if status:
        words = _runtime(ort.cuda_version.partition(".")[0]).cudaGetErrorString
        words.restype = ctypes.c_char_p
        raise RuntimeError(f"CUDA failure {status}: {words(status).decode()}")
    return status is not None


def call_runtime(name: str, *arguments: Any) -> int | None:
    """Call a function of the CUDA runtime that onnxruntime has loaded; return its status, None without a runtime."""
    runtime = _runtime(ort.cuda_version.partition(".")[0])
    if runtime is None:
        return None
    status: int = getattr(runtime, name)(*arguments)
    if status != 0:
        runtime.cudaGetLastError()  # clears it, or the next kernel of this thread would report it
    return status


@functools.cache
def _runtime(version: str) -> Any:
    try:
        return ctypes.CDLL(f"libcudart.so.{version}")
    except OSError:
        return None
