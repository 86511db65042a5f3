"""Stand-ins that behave: an engine whose runs a test can hold, delay and break, and tiny model folders that are real.

A test can tell whose logits it has: `FakeEngine` gives the image's number, `tiny_logits` follows a formula.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.decoding.decode_process import Job, work
from service.decoding.process_pool import ProcessPool, Reply
from service.engine.metadata import MODEL_FILE, ModelMetadata, Provenance, ResizePolicy, Unfamiliarity, to_props
from service.engine.runners import Outputs
from service.repository.folder import GOLDEN_FILE, Golden, save_golden

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

HEIGHT, WIDTH, CLASSES = 4, 6, 5  # all different, so that a mix-up shows

Defect = Literal[
    "corrupt_onnx",
    "empty_onnx",
    "missing_onnx",
    "float_input",
    "input_name",
    "output_name",
    "two_outputs",
    "fixed_batch",
    "no_metadata",
    "broken_metadata",
    "too_few_labels",
    "other_size",
    "golden_missing",
    "golden_corrupt",
    "golden_pickled",
    "golden_mismatch",
    "golden_of_other_size",
]


def tiny_metadata(**changes: object) -> ModelMetadata:
    """Metadata of a model with input [HEIGHT, WIDTH] and CLASSES labels; `changes` replace fields."""
    fields = {
        "schema_version": 1,
        "name": "tiny",
        "labels": tuple(f"class {index}" for index in range(CLASSES)),
        "input_size": (HEIGHT, WIDTH),
        "resize": ResizePolicy(),
        "dataset": "noise",
        "metrics": None,
        "preset": "tiny",
        "parameters": HEIGHT * WIDTH * 3 * CLASSES,
        "precision": "float32",
        "golden_tolerance": 1e-4,
        "provenance": Provenance(
            git_commit=None, checkpoint_sha256="0" * 64, created="2026-01-01T00:00:00Z", versions={"onnx": "1"}
        ),
    }
    return ModelMetadata.model_validate(fields | changes)


def tiny_unfamiliarity(threshold: float) -> Unfamiliarity:
    """Metadata of an output `unfamiliarity`."""
    return Unfamiliarity(threshold=threshold, split="val", n=100, flagged=0.05, training_images=400)


def tiny_images(n: int, seed: int = 0) -> Images:
    """Noise, uint8 [n, HEIGHT, WIDTH, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, HEIGHT, WIDTH, 3), dtype=np.uint8)


def image(number: int) -> Images:
    """An image that `FakeEngine` recognises: uint8 [HEIGHT, WIDTH, 3] that holds `number` < 65,536."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[0, 0, :2] = divmod(number, 256)
    return image


class FakeEngine:
    """An engine whose logits are [the image's number, `tag`, 0, 0, 0] and whose runs obey the test.

    With a `threshold` it has the output `unfamiliarity`, which is the image's number and a half.

    Attributes:
        batches: the numbers of the images of each run that has begun, in order.
        delay: seconds that each run sleeps.
        fail: called with a batch's numbers; what it returns is raised.
        runs: released when a run begins: acquire it to wait for that.
        ended: released when a run ends.
    """

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    runs_alone = False

    def __init__(
        self,
        max_batch_size: int = 4,
        *,
        tag: float = 0,
        delay: float = 0,
        feature_dim: int | None = None,
        threshold: float | None = None,
    ) -> None:
        unfamiliarity = None if threshold is None else tiny_unfamiliarity(threshold)
        self.metadata = tiny_metadata(feature_dim=feature_dim, unfamiliarity=unfamiliarity)
        self.max_batch_size = max_batch_size
        self.tag = tag
        self.delay = delay
        self.batches: list[list[int]] = []
        self.features_runs: list[int] = []
        self.threads: set[int] = set()
        self.fail: Callable[[list[int]], Exception | None] = lambda numbers: None
        self.runs = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.warmed = False
        self.closing = threading.Event()
        self._permits: threading.Semaphore | None = None

    def hold(self) -> None:
        """Let no further run end before it is released."""
        self._permits = threading.Semaphore(0)

    def release(self, runs: int = 1) -> None:
        """Let this many held runs end."""
        assert self._permits is not None
        self._permits.release(runs)

    def let_go(self) -> None:
        """Hold no run any more."""
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release(1000)

    def run(self, images: Images) -> Logits:
        """Return the logits, after what the test has ordered."""
        try:
            return self._run(images)
        finally:
            self.ended.release()

    def run_outputs(self, images: Images, *, with_features: bool = False) -> Outputs:
        """Return the logits, the scores, and as features the images' numbers, counted up."""
        logits = self.run(images)
        outputs = Outputs(logits, None if self.metadata.unfamiliarity is None else logits[:, 0] + np.float32(0.5))
        if not with_features:
            return outputs
        assert self.metadata.feature_dim is not None
        self.features_runs.append(len(images))
        return outputs._replace(features=logits[:, :1] + np.arange(self.metadata.feature_dim, dtype=np.float32))

    def _run(self, images: Images) -> Logits:
        numbers = [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in images]
        self.threads.add(threading.get_ident())
        self.batches.append(numbers)
        self.runs.release()
        permits = self._permits
        if permits is not None:
            permits.acquire()
        if self.delay:
            time.sleep(self.delay)
        error = self.fail(numbers)
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        logits = np.zeros((len(images), CLASSES), dtype=np.float32)
        logits[:, 0], logits[:, 1] = numbers, self.tag
        return logits

    def warm_up(self) -> None:
        """Record the call."""
        self.threads.add(threading.get_ident())
        self.warmed = True

    def close(self) -> None:
        """Record the call."""
        self.closing.set()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self.closing.is_set()


def tiny_logits(images: Images, version: int) -> Logits:
    """What the tiny model of `version` answers, computed with NumPy: float32 [N, CLASSES]."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return (flat @ _weights(images[0].size, version).astype(np.float64)).astype(np.float32)


def make_model_folder(folder: Path, version: int = 1, *, defect: Defect | None = None, **metadata: object) -> Path:
    """Write `folder/<version>` as export does, whole or with one `defect`; return its path.

    The model is one matrix product that differs from version to version.
    """
    temporary = folder / f".{version}-writing"
    temporary.mkdir(parents=True)
    if defect != "missing_onnx":
        (temporary / MODEL_FILE).write_bytes(_model_bytes(version, defect, metadata))
    _write_golden(temporary / GOLDEN_FILE, version, defect)
    return temporary.rename(folder / str(version))


def _weights(inputs: int, version: int) -> NDArray[np.float32]:
    return np.random.default_rng(version).normal(0, 0.01, (inputs, CLASSES)).astype(np.float32)


def _model_bytes(version: int, defect: Defect | None, changes: dict[str, object]) -> bytes:
    if defect == "corrupt_onnx":
        return b"this is no protobuf"
    if defect == "empty_onnx":
        return b""
    if defect == "too_few_labels":
        changes = {**changes, "labels": ("cat", "dog")}
    if defect == "other_size":
        changes = {**changes, "input_size": (HEIGHT, HEIGHT)}
    props = {} if defect == "no_metadata" else to_props(tiny_metadata(**changes))
    if defect == "broken_metadata":
        props["perceiver.labels"] = "__import__('os')"
    return tiny_model(version, defect, props).SerializeToString()


def tiny_model(version: int, defect: Defect | None, props: dict[str, str]) -> onnx.ModelProto:
    """The graph: images -> Cast -> Reshape -> MatMul -> logits."""
    images = "pixels" if defect == "input_name" else "images"
    logits = "scores" if defect == "output_name" else "logits"
    batch = 2 if defect == "fixed_batch" else "batch"
    dtype = TensorProto.FLOAT if defect == "float_input" else TensorProto.UINT8
    inputs = HEIGHT * WIDTH * 3
    outputs = [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, [batch, CLASSES]),
        helper.make_tensor_value_info("flat", TensorProto.FLOAT, [batch, inputs]),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [images], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["float", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], [logits]),
        ],
        "tiny",
        [helper.make_tensor_value_info(images, dtype, [batch, HEIGHT, WIDTH, 3])],
        outputs if defect == "two_outputs" else outputs[:1],
        [
            numpy_helper.from_array(_weights(inputs, version), "weights"),
            numpy_helper.from_array(np.array([-1, inputs], dtype=np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, props)
    return model


def _write_golden(path: Path, version: int, defect: Defect | None) -> None:
    images = tiny_images(7, seed=version)
    if defect == "golden_of_other_size":
        images = np.ascontiguousarray(images[:, :, :HEIGHT])
        golden = Golden(images, np.zeros(7, dtype=np.int64), np.zeros((7, CLASSES), dtype=np.float32))
    else:
        logits = tiny_logits(images, version)
        golden = Golden(images, logits.argmax(axis=1), logits + (defect == "golden_mismatch"))
    if defect == "golden_corrupt":
        path.write_bytes(b"PK\x03\x04 this is no archive")
    elif defect == "golden_pickled":
        np.savez(path, images=np.array([{"a": "pickle"}]), labels=golden.labels, logits=golden.logits)
    elif defect != "golden_missing":
        save_golden(path, golden)


class InPlacePool(ProcessPool):
    """A `ProcessPool` without processes: decodes at once, where it is called."""

    def __init__(self, real: ProcessPool) -> None:
        self._limits = real._limits
        self.decoded = 0

    async def start(self) -> None:
        pass

    async def run(self, job: Job, data: bytes) -> Reply:
        self.decoded += 1
        return Reply.unpack(work(job, data, self._limits))

    def close(self) -> None:
        pass
