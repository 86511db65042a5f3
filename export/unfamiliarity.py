"""How unlike its training images an image is: the Mahalanobis distance of its features (Lee et al. 2018).

The distance to the nearest class mean, under one covariance for all classes. It is written into the graph behind the
features, after float16 or int8 have changed what comes before, so it stays in float32.

Shape letters: N images, D width of the features, C classes.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.golden import spread
from export.graph.trained import Features, Images
from service.engine.metadata import FEATURES_NAME, MODEL_FILE, UNFAMILIARITY_NAME, Unfamiliarity
from service.engine.onnx_engine import OnnxEngine
from training.data.dataset import DataSet
from training.out_of_distribution import ALTERED, out_of_distribution

TRAINING_IMAGES: Final = 5_000  # in equal numbers of all classes; more do not tell better
TEST_IMAGES: Final = 2_000  # of which the share that is flagged is measured
MIN_VALIDATION_IMAGES: Final = 100  # with fewer the threshold rests on less than five of them
PASSING: Final = 0.95  # share of the validation images at or below the threshold
BATCH_SIZE: Final = 32
PREFIX: Final = "unfamiliarity."  # of the names within the graph


class Mahalanobis:
    """Distance to the nearest class mean, with one covariance for all classes.

    The covariance is shrunk towards a multiple of the identity by the oracle approximating formula (Chen et al. 2010,
    "Shrinkage algorithms for MMSE covariance estimation"), so few images suffice, and rounding is not blown up.

    Attributes:
        centre: float64 [D], mean of the class means.
        whiten: float64 [D, D], maps centred features to a space in which the covariance is the identity.
        means: float64 [C, D], the class means in that space.

    Args:
        features: float [N, D], of known images.
        labels: int64 [N], their classes.

    Raises:
        ExportError: within each class all images have the same features.
    """

    def __init__(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> None:
        classes, index = np.unique(labels, return_inverse=True)
        points = features.astype(np.float64)
        means = np.stack([points[index == one].mean(axis=0) for one in range(len(classes))])
        deviations = points - means[index]
        n, dim = points.shape
        covariance = deviations.T @ deviations / n
        square_of_trace, trace_of_square = np.trace(covariance) ** 2, np.square(covariance).sum()
        above = (1 - 2 / dim) * trace_of_square + square_of_trace
        below = (n + 1 - 2 / dim) * (trace_of_square - square_of_trace / dim)
        shrinkage = min(1.0, above / below) if below > 0 else 1.0
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / dim * np.eye(dim)
        if not np.trace(covariance) > 0:
            raise ExportError("the features of the training images do not vary within any class")
        values, vectors = np.linalg.eigh(covariance)
        self.whiten: NDArray[np.float64] = vectors / np.sqrt(values)
        self.centre: NDArray[np.float64] = means.mean(axis=0)
        self.means: NDArray[np.float64] = (means - self.centre) @ self.whiten

    def distance(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the distance of features, float [N, D], to the nearest class: float64 [N]."""
        points = (features - self.centre) @ self.whiten
        squares = [np.square(points - mean).sum(axis=1) for mean in self.means]
        nearest: NDArray[np.float64] = np.sqrt(np.min(squares, axis=0))
        return nearest

    def append_to(self, graph: ModelProto) -> ModelProto:
        """Return a copy of a graph with an output `features` that has an output `unfamiliarity`, float32 [N], too."""
        constants = {
            "whiten": self.whiten,
            "whiten_bias": -self.centre @ self.whiten,
            "means": -2 * self.means.T,
            "means_squared": np.square(self.means).sum(axis=1),
        }
        names = {name: PREFIX + name for name in (*constants, "axis", "one", "points", "norm", "relative")}
        names |= {name: PREFIX + name for name in ("nearest", "class", "square", "not_negative", "root")}
        # |x - m|^2 = |x|^2 + (|m|^2 - 2 x m). The least of the latter is a TopK: ReduceMin of opset 20 has no CUDA
        # kernel in every onnxruntime.
        nodes = [
            helper.make_node("Gemm", [FEATURES_NAME, names["whiten"], names["whiten_bias"]], [names["points"]]),
            helper.make_node("ReduceSumSquare", [names["points"], names["axis"]], [names["norm"]], keepdims=1),
            helper.make_node("Gemm", [names["points"], names["means"], names["means_squared"]], [names["relative"]]),
            helper.make_node(
                "TopK", [names["relative"], names["one"]], [names["nearest"], names["class"]], axis=1, largest=0
            ),
            helper.make_node("Add", [names["norm"], names["nearest"]], [names["square"]]),
            helper.make_node("Relu", [names["square"]], [names["not_negative"]]),  # rounding may take it below 0
            helper.make_node("Sqrt", [names["not_negative"]], [names["root"]]),
            helper.make_node("Squeeze", [names["root"], names["axis"]], [UNFAMILIARITY_NAME]),
        ]
        result = ModelProto()
        result.CopyFrom(graph)
        for number, node in enumerate(nodes):
            node.name = f"{PREFIX}{number}"
        result.graph.node.extend(nodes)
        for name, value in constants.items():
            result.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), names[name]))
        for name in ("axis", "one"):
            result.graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), names[name]))
        result.graph.output.append(helper.make_tensor_value_info(UNFAMILIARITY_NAME, TensorProto.FLOAT, ["batch"]))
        return result


@dataclass(frozen=True)
class Flagged:
    """How many images of a kind are unfamiliar.

    Attributes:
        images: what they are.
        n: how many.
        share: of them, 0..1.
    """

    images: str
    n: int
    share: float


@dataclass(frozen=True)
class Fit:
    """What is measured on a data set.

    Attributes:
        distance: fitted on training images.
        metadata: the threshold, fitted on validation images.
        flagged: share of test images, where there are any, and of drawn images of no class.
    """

    distance: Mahalanobis
    metadata: Unfamiliarity
    flagged: tuple[Flagged, ...]


def why_not(data: DataSet | None, *, is_changed: bool) -> str | None:
    """Return why there is nothing to fit on; None if there is."""
    if data is None:
        return "the weights are random"
    if is_changed:
        return "the data set has other images than in training"
    if (n := len(data.val.labels)) < MIN_VALIDATION_IMAGES:
        return f"{n} validation images are too few for a threshold; at least {MIN_VALIDATION_IMAGES} are needed"
    return None


def fit_unfamiliarity(content: bytes, data: DataSet) -> Fit:
    """Fit class means, covariance and threshold, and measure which images are flagged.

    Args:
        content: of a float32 file with the output `features`.
        data: of the run.

    Raises:
        ExportError: the features are not finite, or do not vary.
        EngineError: the file does not run.
    """
    train_labels, val_images = data.train.labels.numpy(), data.val.images.numpy()
    chosen = per_class(train_labels, TRAINING_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        path.write_bytes(content)
        engine = OnnxEngine(path, provider="cpu", max_batch_size=BATCH_SIZE)
        distance = Mahalanobis(run_features(engine, data.train.images.numpy()[chosen]), train_labels[chosen])
        known = distance.distance(run_features(engine, val_images))
        threshold = float(np.quantile(known, PASSING).astype(np.float32))
        kinds = {} if data.test is None else {"test": spread(data.test.images.numpy(), TEST_IMAGES)}
        kinds |= {kind: some for kind, some in out_of_distribution(val_images).items() if kind not in ALTERED}
        scores = {kind: distance.distance(run_features(engine, images)) for kind, images in kinds.items()}
        engine.close()
    flagged = (Flagged(kind, len(each), float((each > threshold).mean())) for kind, each in scores.items())
    metadata = Unfamiliarity(
        threshold=threshold,
        split="val",
        n=len(known),
        flagged=float((known > threshold).mean()),
        training_images=len(chosen),
    )
    return Fit(distance, metadata, tuple(flagged))


def per_class(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the indices of about `count` of the labels [N], evenly spaced and equally many of each class."""
    classes = np.unique(labels)
    share = max(1, count // len(classes))
    return np.concatenate([spread(np.flatnonzero(labels == one), share) for one in classes])


def run_features(engine: OnnxEngine, images: Images) -> Features:
    """Run uint8 [N, H, W, 3] in batches; returns float32 [N, D].

    Raises:
        ExportError: one is not finite.
    """
    parts = []
    for at in range(0, len(images), BATCH_SIZE):
        features = engine.run_outputs(images[at : at + BATCH_SIZE], with_features=True).features
        assert features is not None
        parts.append(features)
    result = np.concatenate(parts)
    if not np.isfinite(result).all():
        raise ExportError("some features of the exported model are not finite")
    return result
