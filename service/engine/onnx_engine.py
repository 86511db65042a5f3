"""The engine: runs a model file. The service runs it, and export verifies it.

Shape letters: N images of a batch, H and W the model's input size, C classes, D width of the features.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from service.engine.batch_size_tuning import fastest_size
from service.engine.capture_lock import capture_lock
from service.engine.cuda import BucketRunner, cuda_runner, open_cuda_session
from service.engine.cuda_probe import why_no_graphs
from service.engine.metadata import ModelMetadata
from service.engine.runners import (
    HostRunner,
    Images,
    Logits,
    Outputs,
    concatenate,
    default_buckets,
    is_out_of_memory,
    names_of,
)
from service.engine.session import (
    EngineError,
    Provider,
    ProviderChoice,
    SessionSpec,
    check_graph,
    metadata_of,
    open_session,
    resolve_provider,
)

logger = logging.getLogger(__name__)

Runner = HostRunner | BucketRunner


class Engine(Protocol):
    """Runs batches of one model on one device. Not thread-safe, and bound to a thread: see `run`.

    Attributes:
        metadata: of the file that runs.
        provider: where it runs: "cpu", "cuda" or "tensorrt".
        max_batch_size: largest N; falls when memory runs out.
        runs_alone: whether it takes only batches that come while no other engine of the model runs.
    """

    metadata: ModelMetadata
    provider: Provider
    max_batch_size: int
    runs_alone: bool

    def run(self, images: Images) -> Logits:
        """Classify uint8 [N, H, W, 3], RGB, 1 <= N <= max_batch_size; return float32 [N, C].

        Call this and `warm_up` from the same thread: a captured CUDA graph belongs to a thread.
        """

    def run_outputs(self, images: Images, *, with_features: bool = False) -> Outputs:
        """Return the logits as `run`, and the other outputs; features only where the metadata have a `feature_dim`."""

    def warm_up(self) -> None:
        """Run the batch sizes that matter, so that the first request does not pay for it."""

    def close(self) -> None:
        """Free the memory; `run` raises EngineError afterwards."""


class OnnxEngine:
    """An `Engine` on onnxruntime.

    Args:
        path: the .onnx file.
        provider: "auto" takes CUDA if it works, else the CPU; any other choice runs there or raises.
        device_id: index of the GPU.
        max_batch_size: largest batch in images.
        intra_op_threads: threads of one run on the CPU; 0: one a physical core that this process may use.
        buckets: batch sizes on a GPU, where batches are padded to the next one; default: powers of two.
        gpu_memory_limit_bytes: ceiling of onnxruntime's arena on the GPU; None: no ceiling.
        cuda_graphs: capture each bucket as a CUDA graph at warm-up (CUDA only).
        tune_batch_size: measure at warm-up which batch size is fastest, and make it the largest (CPU only).
        runs_alone: see `Engine`.

    Attributes:
        without_graphs: why it has no CUDA graphs, though they were asked for; else None.

    Raises:
        EngineError: the file can't be loaded, does not run on that provider, or its graph breaks the contract.
        ArtifactError: its metadata break the contract.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: ProviderChoice = "auto",
        device_id: int = 0,
        max_batch_size: int = 32,
        intra_op_threads: int = 0,
        buckets: Sequence[int] | None = None,
        gpu_memory_limit_bytes: int | None = None,
        cuda_graphs: bool = True,
        tune_batch_size: bool = False,
        runs_alone: bool = False,
    ) -> None:
        if max_batch_size < 1:
            raise EngineError(f"max_batch_size must be at least 1, and is {max_batch_size}")
        self.path = path
        self.provider: Provider = resolve_provider(provider, device_id)
        self._buckets = buckets
        self._spec = SessionSpec(
            provider=self.provider,
            device_id=device_id,
            intra_op_threads=intra_op_threads,
            max_batch_size=max_batch_size,
            gpu_memory_limit_bytes=gpu_memory_limit_bytes,
            cuda_graphs=cuda_graphs and self.provider == "cuda",
        )
        self._runner: Runner | None = None
        self.max_batch_size = max_batch_size
        self.runs_alone = runs_alone
        self.without_graphs: str | None = None
        self._open()
        self._tunes = tune_batch_size and self.provider == "cpu"

    def run(self, images: Images) -> Logits:
        """Classify uint8 [N, H, W, 3]; return float32 [N, C]. See `Engine.run`, and `run_outputs`."""
        return self.run_outputs(images).logits

    def run_outputs(self, images: Images, *, with_features: bool = False) -> Outputs:
        """Run uint8 [N, H, W, 3]. See `Engine.run_outputs`.

        A batch that runs out of memory runs again in halves, and `max_batch_size` falls to the half. One with features
        fails: they are rare, and must not slow down the others.

        Raises:
            EngineError: the images have another dtype or shape, the graph has no features, or onnxruntime failed.
        """
        runner = self._open_runner()
        self._check(images)
        if with_features and self.metadata.feature_dim is None:
            raise EngineError(f"{self.path}: this graph has no output features")
        try:
            return runner.run(images, with_features=with_features)
        except Exception as error:
            if with_features or not is_out_of_memory(error):
                raise self._failed(images, error) from error
            size = self._lower_ceiling(runner, images, error)
            return self._run_in_parts(runner, images, size)

    def warm_up(self) -> None:
        """Run every bucket from the largest down, and capture it on a GPU. On a CPU: the largest batch, and one image.

        If a size does not fit in memory, `max_batch_size` falls, unless a larger size is warm and takes its batches.
        With `tune_batch_size` it falls to a size that is clearly faster, in images a second; larger ones are not run.

        If a CUDA graph can't be captured, the session is reopened without graphs.

        Raises:
            EngineError: as `run`.
        """
        if self._tunes:
            self._tune()
            return
        reason = ""
        try:
            self._run_each_size()
        except EngineError as error:
            if not self._spec.cuda_graphs:
                raise
            reason = str(error)
        if reason:  # outside `except`: the error's traceback holds the session
            self._open_without_graphs(reason)
            self._run_each_size()

    def _run_each_size(self) -> None:
        runner = self._open_runner()
        warm: set[int] = set()
        while cold := [size for size in runner.sizes if size not in warm]:
            images = self._blank(cold[0])
            try:
                for _ in range(runner.warm_up_runs):
                    runner.run(images)
                warm.add(cold[0])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise self._failed(images, error) from error
                if warm:
                    logger.warning(
                        "%s: no memory for batches of %d alone; the next size takes them", self.path, cold[0]
                    )
                    runner.drop(cold[0])
                else:
                    self._lower_ceiling(runner, images, error)

    def _tune(self) -> None:
        """Lower `max_batch_size` to a batch size that is clearly faster, if there is one."""
        runner, ceiling = self._open_runner(), self.max_batch_size
        assert isinstance(runner, HostRunner)  # it tunes on a CPU alone
        try:
            fastest = fastest_size(lambda size: runner.run(self._blank(size)), default_buckets(ceiling))
        except Exception as error:
            if not is_out_of_memory(error):
                raise self._failed(self._blank(ceiling), error) from error
            fastest = self._lower_ceiling(runner, self._blank(ceiling), error)
            self._run_each_size()
        self.max_batch_size = min(self.max_batch_size, fastest)
        if self.max_batch_size < ceiling:
            try:
                runner.trim(self._blank(1))
            except Exception as error:  # the engine works, and takes more memory
                logger.warning("%s: the memory of larger batches is kept: %s", self.path, error)
        logger.info("%s: batches of up to %d, of %d allowed", self.path, self.max_batch_size, ceiling)

    def close(self) -> None:
        """Free the session and its buffers."""
        with capture_lock.shared():  # freeing GPU memory would spoil another model's capture
            self._runner = None

    def _open(self) -> None:
        reason = why_no_graphs() if self._spec.cuda_graphs else None
        if reason is None:
            try:
                self.metadata, self._runner = _open(self.path, self._spec, self._buckets)
            except EngineError as error:
                if not self._spec.cuda_graphs:
                    raise
                reason = str(error)
        if reason is not None:
            self._open_without_graphs(reason)

    def _open_without_graphs(self, reason: str) -> None:
        # Logged first: on a GPU that has gone, freeing the session ends the process.
        logger.warning("%s: no CUDA graphs, kernels are launched one by one: %s", self.path, reason)
        self.close()  # before another session needs the memory
        self.without_graphs = reason
        self._spec = replace(self._spec, cuda_graphs=False)
        self.max_batch_size = self._spec.max_batch_size
        self.metadata, self._runner = _open(self.path, self._spec, self._buckets)

    def _blank(self, size: int) -> Images:
        return np.zeros((size, *self.metadata.input_size, 3), dtype=np.uint8)

    def _open_runner(self) -> Runner:
        if self._runner is None:
            raise EngineError(f"{self.path}: this engine has been closed")
        return self._runner

    def _check(self, images: Images) -> None:
        wanted = (*self.metadata.input_size, 3)
        if images.dtype != np.uint8 or images.shape[1:] != wanted or not 1 <= len(images) <= self.max_batch_size:
            raise EngineError(
                f"{self.path}: a batch must be uint8 [1..{self.max_batch_size}, {', '.join(map(str, wanted))}], "
                f"and is {images.dtype} {list(images.shape)}"
            )

    def _lower_ceiling(self, runner: Runner, images: Images, cause: Exception) -> int:
        smaller = runner.shrink(len(images))
        if smaller == 0:
            raise EngineError(f"{self.path}: there is not enough memory for a single image: {cause}") from cause
        logger.warning("%s: no memory for a batch of %d; from now on at most %d", self.path, len(images), smaller)
        self.max_batch_size = min(self.max_batch_size, smaller)
        return smaller

    def _run_in_parts(self, runner: Runner, images: Images, size: int) -> Outputs:
        try:
            return concatenate([runner.run(images[at : at + size]) for at in range(0, len(images), size)])
        except Exception as error:
            raise EngineError(f"{self.path}: no memory for {len(images)}, nor for {size}: {error}") from error

    def _failed(self, images: Images, error: Exception) -> EngineError:
        return EngineError(f"{self.path}: a batch of {len(images)} failed: {error}")


def _open(path: Path, spec: SessionSpec, buckets: Sequence[int] | None) -> tuple[ModelMetadata, Runner]:
    """Open and check the session, and return its metadata and runner."""
    on_device = spec.provider != "cpu"
    session = open_cuda_session(path, spec) if on_device else open_session(path, spec)
    metadata = metadata_of(session, path)
    check_graph(session, metadata, path)
    if not on_device:
        return metadata, HostRunner(session, spec.max_batch_size, names_of(metadata))
    sizes = sorted({*(buckets or default_buckets(spec.max_batch_size)), spec.max_batch_size})
    if sizes[0] < 1 or sizes[-1] > spec.max_batch_size:
        raise EngineError(f"buckets must lie between 1 and max_batch_size {spec.max_batch_size}, and are {buckets}")
    return metadata, cuda_runner(session, metadata, sizes, spec)
