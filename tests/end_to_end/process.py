"""A real `python -m service` in a process of its own, over a tiny real model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.engine.metadata import MODEL_FILE, to_props
from service.repository.folder import GOLDEN_FILE, Golden, save_golden
from tests.fakes import CLASSES, HEIGHT, WIDTH, tiny_metadata

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SECONDS = 150  # on a busy machine; no test waits for them to pass


class Process:
    """The process, and what it wrote to stderr."""

    def __init__(self, module: str, arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
        self.log = log
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PERCEIVER_")}
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=clean | environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                process_group=0,  # so that a test can signal all of it, as a terminal does
            )

    @property
    def stderr(self) -> str:
        return self.log.read_text()

    def url(self) -> str:
        """Where it listens, once it does."""
        return self.wait(lambda: self.stderr.partition("starting on ")[2].partition(", not ready yet")[0])

    @contextmanager
    def ready(self) -> Iterator[httpx.Client]:
        """A client, once the service is ready."""
        with httpx.Client(base_url=self.url(), timeout=SECONDS, verify=False) as client:
            self.wait(lambda: client.get("/health/ready").status_code == 200)
            yield client

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def signal_group(self, number: int) -> None:
        os.killpg(self.popen.pid, number)

    def children(self) -> list[int]:
        """The ids of the processes that it has started, and that have not ended."""
        return [int(pid) for pid in Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()]

    def exit_status(self) -> int:
        """The status, once it has ended."""
        return self.popen.wait(SECONDS)

    def wait(self, probe: Callable[[], T]) -> T:
        """The first true value of a probe, while the process lives."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            if value := probe():
                return value
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}: {self.stderr}"
            time.sleep(0.02)
        raise TimeoutError(self.stderr)

    def wait_or_end(self, probe: Callable[[], object]) -> None:
        """Wait until a probe is true, or the process has ended."""
        until = time.monotonic() + SECONDS
        while self.popen.poll() is None and not probe():
            assert time.monotonic() < until, self.stderr
            time.sleep(0.02)


@contextmanager
def started(
    tmp_path: Path, *arguments: str, module: str = "service", port: int = 0, **environment: str
) -> Iterator[Process]:
    """Start the service on a free port, or this one; whatever happens, it is gone at the end.

    `module` may be one that starts the service with something changed in it.
    """
    process = Process(
        module, ("--port", str(port), *arguments), environment, tmp_path / f"stderr-{time.monotonic_ns()}"
    )
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()


def on_model(folder: Path, *arguments: str) -> tuple[str, ...]:
    """The arguments for a small real model on a CPU."""
    return ("--model-dir", str(folder), "--provider", "cpu", "--intra-op-threads", "1", *arguments)


def make_slow_model(folder: Path, steps: int) -> None:
    """A model that counts to `steps` times the first value of the batch's first image, and answers zeros.

    With an image whose first value is 0 it is quick, and so are its golden images.
    """
    version = folder / "1"
    version.mkdir(parents=True)
    model = helper.make_model(_slow_graph(steps), opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, to_props(tiny_metadata()))
    onnx.checker.check_model(model)
    (version / MODEL_FILE).write_bytes(model.SerializeToString())
    images = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    logits = np.zeros((2, CLASSES), np.float32)
    save_golden(version / GOLDEN_FILE, Golden(images, np.zeros(2, np.int64), logits))


def _slow_graph(steps: int) -> onnx.GraphProto:
    counting = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still_going"]),
            helper.make_node("Add", ["count", "one"], ["next_count"]),
        ],
        "counting",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("count", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_count", TensorProto.FLOAT, []),
        ],
    )
    inputs = HEIGHT * WIDTH * 3
    return helper.make_graph(
        [
            helper.make_node("Reshape", ["images", "rows"], ["flat"]),
            helper.make_node("Gather", ["flat", "first"], ["image"], axis=0),
            helper.make_node("Gather", ["image", "first"], ["value"], axis=0),
            helper.make_node("Cast", ["value"], ["value64"], to=TensorProto.INT64),
            helper.make_node("Mul", ["value64", "steps"], ["trips"]),
            helper.make_node("Loop", ["trips", "true", "zero"], ["counted"], body=counting),
            helper.make_node("Cast", ["flat"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["float", "weights"], ["product"]),
            helper.make_node("Mul", ["counted", "zero"], ["nothing"]),
            helper.make_node("Add", ["product", "nothing"], ["logits"]),
        ],
        "slow",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [
            numpy_helper.from_array(np.array([-1, inputs]), "rows"),
            numpy_helper.from_array(np.array(0), "first"),
            numpy_helper.from_array(np.array(steps), "steps"),
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.zeros((inputs, CLASSES), np.float32), "weights"),
        ],
    )
