"""What one run of the model gave: logits, and the ranking of their classes, made once for all pictures of a batch."""

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed


class Outputs:
    """Logits of one batch. NumPy's cost lies in its calls: ranking 32 pictures together costs hardly more than one.

    The first answer that is written ranks them, on the event loop; the engine's thread has the next batch by then.

    Attributes:
        logits: float32 [N, C].
    """

    __slots__ = ("_order", "_probabilities", "logits")

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self._order: NDArray[np.intp] | None = None  # of the classes, the most probable first
        self._probabilities = logits  # in that order

    def top(self, row: int, k: int) -> tuple[list[int], list[float]]:
        """Return the k most probable classes of a picture and their probabilities; of equal ones the lower index first.

        Raises:
            InferenceFailed: a logit of this picture is not a number, so that no answer would be one.
        """
        order = self._order
        if order is None:
            order = self._rank()
        probabilities: list[float] = self._probabilities[row, :k].tolist()
        if not isfinite(probabilities[0]):
            raise InferenceFailed("The model's answer is not a number.")
        classes: list[int] = order[row, :k].tolist()
        return classes, probabilities

    def _rank(self) -> NDArray[np.intp]:
        order = self._order = np.argsort(-self.logits, axis=1, kind="stable")
        ordered = self.logits[np.arange(len(order))[:, None], order]
        exponentials = np.exp(ordered - ordered[:, :1])
        self._probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return order
