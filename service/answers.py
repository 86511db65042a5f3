"""Logits to the JSON of `PredictResponse`, by hand: it is on the path of every picture.

`tests/service/test_answers.py` holds the bytes against the pydantic model.
"""

import json
from collections.abc import Sequence
from math import isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.artifact import ModelMetadata
from service.errors import InferenceFailed

DEFAULT_TOP_K: Final = 5


class AnswerWriter:
    """Writes the answers of one model version; what is the same in all of them is encoded once.

    Attributes:
        classes: the number of labels.
    """

    def __init__(self, metadata: ModelMetadata, version: int) -> None:
        self.classes = len(metadata.labels)
        self._head = f'{{"model":{json.dumps(metadata.name)},"version":{version},"predictions":['
        self._entries = [
            f'{{"label":{json.dumps(label)},"index":{index},"probability":'
            for index, label in enumerate(metadata.labels)
        ]

    def write(self, logits: NDArray[np.float32], filenames: Sequence[str | None], top_k: int) -> bytes:
        """Softmax, top k, JSON.

        Args:
            logits: float32 [N, C].
            filenames: N names or None.
            top_k: 1 to C; of equal probabilities the lower index comes first.

        Raises:
            InferenceFailed: a logit is not a number, so that no answer would be one.
        """
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        totals: list[float] = exponentials.sum(axis=1).tolist()
        if not all(map(isfinite, totals)):
            raise InferenceFailed("The model's answer is not a number.")
        pictures = [
            self._picture(name, top.tolist(), row.take(top).tolist(), total)
            for name, top, row, total in zip(filenames, order, exponentials, totals, strict=True)
        ]
        return f"{self._head}{','.join(pictures)}]}}".encode()

    def _picture(self, filename: str | None, indices: list[int], weights: list[float], total: float) -> str:
        entries = self._entries
        top = "},".join(
            [entries[index] + "%.6f" % (weight / total) for index, weight in zip(indices, weights, strict=True)]
        )
        name = "null" if filename is None else json.dumps(filename)
        return f'{{"filename":{name},"top":[{top}}}]}}'
