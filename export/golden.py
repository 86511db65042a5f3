"""Golden images: validation images with torch's logits and features in float32.

Shape letters: K golden images, H and W the input size in pixels, C classes.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError
from export.graph.trained import TrainedModel, reference_features, reference_logits
from export.source import Source
from service.engine.metadata import ArtifactError
from service.repository.folder import Golden
from training.data.dataset import DataSet

T = TypeVar("T", bound=np.generic)


def spread(values: NDArray[T], count: int) -> NDArray[T]:
    """Return up to `count` evenly spaced rows of [N, ...]."""
    index = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(np.int64)
    chosen: NDArray[T] = values[index]
    return chosen


def make_golden(model: TrainedModel, source: Source, data: DataSet | None, count: int) -> Golden:
    """Take evenly spaced validation images, or seeded noise for random weights.

    Args:
        model: the trained model; for noise, its own labels count as true.
        source: what is exported.
        data: data set of the run; None for random weights.
        count: K; fewer if the validation split has fewer.

    Raises:
        ExportError: a logit is not finite.
    """
    if data is None:
        shape = (count, source.run.model.input_size, source.run.model.input_size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    else:
        images = spread(data.val.images.numpy(), count)
    logits = reference_logits(model, images)
    labels = logits.argmax(axis=1) if data is None else spread(data.val.labels.numpy(), count)
    try:
        return Golden(images, labels, logits, reference_features(model, images))
    except ArtifactError as error:
        raise ExportError(
            f"{source.checkpoint}: gives logits that are not finite ({error}); export another checkpoint of the run."
        ) from error
