"""The job that every rival does: a JPEG to the label of its top class. Each rival's server module calls this.

It runs in the rivals' own environments, so it imports only what those hold: numpy, onnxruntime and simplejpeg.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from simplejpeg import decode_jpeg

MAX_BATCH_SIZE = 32
LABELS_KEY = "perceiver.labels"  # of the model's ONNX metadata: a JSON list
MODEL, PORT, SETTING = "RIVAL_MODEL", "RIVAL_PORT", "RIVAL_SETTING_"  # environment variables


class Classifier:
    """The model in onnxruntime on the CPU, with the options that a handler of one's own begins with.

    Args:
        path: of the ONNX file.
        threads: of one run.

    Attributes:
        labels: names of the C classes.
        answers: the JSON of an answer for each of them, encoded once.
    """

    def __init__(self, path: str, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.labels: list[str] = json.loads(self._session.get_modelmeta().custom_metadata_map[LABELS_KEY])
        self.answers = [json.dumps({"label": label}).encode() for label in self.labels]

    def top(self, images: Sequence[NDArray[np.uint8]]) -> list[int]:
        """Return the index of the top class of each of N images, uint8 [H, W, 3] in RGB."""
        logits: Any = self._session.run(None, {"images": np.stack(images)})[0]
        indices: list[int] = logits.argmax(axis=1).tolist()
        return indices


def open_classifier() -> Classifier:
    """Open the model that the environment names, with the threads that it wants."""
    return Classifier(os.environ[MODEL], setting("threads"))


def decode(body: bytes) -> NDArray[np.uint8]:
    """Decode a JPEG to uint8 [H, W, 3], RGB, with the decoder that the service takes for such images."""
    pixels: NDArray[np.uint8] = decode_jpeg(body, "RGB")
    return pixels


def port() -> int:
    """TCP port to listen on, from the environment."""
    return int(os.environ[PORT])


def setting(name: str) -> int:
    """Value of one of the framework's own settings, from the environment."""
    return int(os.environ[SETTING + name.upper()])
