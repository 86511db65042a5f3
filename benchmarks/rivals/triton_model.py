"""The job on Triton: what model.py of its Python backend imports; it runs in a process beside the C++ server.

The backend hands over up to a batch of requests at once, with their bodies as BYTES tensors in shared memory.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

from benchmarks.rivals.job import decode, open_classifier


class TritonPythonModel:
    """Called by the backend under these names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model."""
        self._classifier = open_classifier()
        self._answers = [np.array([[answer]], dtype=np.object_) for answer in self._classifier.answers]

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        """Classify a batch; each request's input is BYTES [1, 1], and so is its answer."""
        images = [decode(pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()[0, 0]) for request in requests]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", self._answers[index])])
            for index in self._classifier.top(images)
        ]
