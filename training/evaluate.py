"""What logits are worth: loss, top-1, top-5, calibration, superclasses, confusions, confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.dataset import Split
from training.preprocessing import Preprocess

CALIBRATION_BINS = 15
TOP5_CLASSES = 6  # with fewer the label is always among the five
PRIOR_DEVIATION = 0.5  # of a temperature's logarithm, before any image is seen


class Metrics(BaseModel):
    """How good logits are on a split; fractions between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    n: int = Field(ge=1, description="images")
    top1: float = Field(description="share whose most likely class is the label")
    top5: float = Field(description="share whose label is among the five most likely classes")
    loss: float = Field(description="mean cross-entropy, nats")
    ece: float = Field(description=f"expected calibration error over {CALIBRATION_BINS} equal bins of confidence")


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that were taken for another.

    count: images of ``true`` that were predicted as ``predicted``.
    share: ``count`` over all images of ``true``, 0..1.
    """

    true: str
    predicted: str
    count: int
    share: float


class SuperclassMetrics(BaseModel):
    """How good logits are on the images of one superclass; fractions between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n: int = Field(ge=1, description="images")
    top1: float = Field(description="share whose most likely class is the label")
    top5: float = Field(description="share whose label is among the five most likely classes")
    superclass_top1: float = Field(description="share whose most likely class is of the right superclass")


class Corruption(BaseModel):
    """How good logits are on corrupted images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="what was done to them")
    n: int = Field(ge=1, description="images")
    top1: float = Field(description="share whose most likely class is the label, 0..1")


class Confidence(BaseModel):
    """How sure a model is of its first answer on some images; fractions between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: str = Field(description="what they are")
    n: int = Field(ge=1, description="images")
    mean: float = Field(description="mean probability of the most likely class")
    above_half: float = Field(description="share whose most likely class has a probability above 0.5")
    top1: float | None = Field(description="share whose most likely class is the label; None where there is no label")


@torch.inference_mode()
def predict_logits(
    model: nn.Module, preprocess: Preprocess, split: Split, batch_size: int = 128, autocast: torch.dtype | None = None
) -> Tensor:
    """Logits of every image, float32 [N, K], in order, on the device of ``preprocess``.

    Args:
        model: put into evaluation mode here, and back into the mode it was in.
        preprocess: to the model's input.
        split: uint8 images.
        batch_size: images at once.
        autocast: type of the forward pass; None for float32.
    """
    was_training = model.training
    model.eval()
    device = preprocess.mean.device
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        parts = [model(preprocess(images.to(device))).float() for images in split.images.split(batch_size)]
    model.train(was_training)
    return torch.cat(parts)


def calibration_bins(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> Tensor:
    """Reliability of the most likely class in equal bins of its probability (Guo et al. 2017).

    Returns:
        float64 [bins, 3]: share of the images, mean confidence, accuracy; zeros where a bin is empty.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).double()
    # Confidences that are not a number become a huge negative index.
    index = (confidence * bins).long().clamp(0, bins - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, correct], dim=1)
    sums = torch.zeros(bins, 3, dtype=torch.float64, device=logits.device).index_add_(0, index, columns)
    counts = sums[:, :1]
    means = torch.where(counts > 0, sums[:, 1:] / counts.clamp(min=1), 0.0)
    return torch.cat([counts / len(labels), means], dim=1)


def measure(logits: Tensor, labels: Tensor, split: str) -> Metrics:
    """The figures of a split.

    Args:
        logits: float32 [N, K].
        labels: int64 [N].
        split: its name.
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=-1).indices == labels[:, None]
    share, confidence, accuracy = calibration_bins(logits, labels).unbind(1)
    return Metrics(
        split=split,
        n=len(labels),
        top1=ranked[:, 0].double().mean().item(),
        top5=ranked.any(-1).double().mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
        ece=(share * (confidence - accuracy).abs()).sum().item(),
    )


def measure_superclasses(
    logits: Tensor, labels: Tensor, superclasses: Sequence[int], names: Sequence[str]
) -> list[SuperclassMetrics]:
    """The figures of each superclass that has images, in the order of the names.

    Args:
        logits: float32 [N, K].
        labels: int64 [N].
        superclasses: of each of the K classes, an index into ``names``.
        names: of the superclasses.
    """
    of_class = torch.tensor(superclasses, device=logits.device)
    ranked = logits.topk(min(5, logits.shape[1]), dim=-1).indices
    right = ranked == labels[:, None]
    columns = torch.stack([right[:, 0], right.any(-1), of_class[ranked[:, 0]] == of_class[labels]], dim=1).double()
    result = []
    for index, name in enumerate(names):
        members = columns[of_class[labels] == index]
        if len(members):
            top1, top5, superclass_top1 = members.mean(0).tolist()
            result.append(
                SuperclassMetrics(name=name, n=len(members), top1=top1, top5=top5, superclass_top1=superclass_top1)
            )
    return result


def measure_confidence(logits: Tensor, labels: Tensor | None, kind: str) -> Confidence:
    """How sure calibrated logits are.

    Args:
        logits: float32 [N, K].
        labels: int64 [N]; None where no class is right.
        kind: what the images are.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    return Confidence(
        pictures=kind,
        n=len(logits),
        mean=confidence.mean().item(),
        above_half=(confidence > 0.5).double().mean().item(),
        top1=None if labels is None else (predicted == labels).double().mean().item(),
    )


def most_confused(
    targets: ArrayLike, predictions: ArrayLike, labels: Sequence[str], limit: int = 20
) -> list[ConfusedPair]:
    """Return the at most ``limit`` ordered pairs of classes confused most often, worst first.

    targets, predictions: int64 [N], indices into ``labels``. Of pairs with equal shares the earlier classes come first.
    """
    # Of the pairs that there are: a matrix of all would have gigabytes of 10,000 classes.
    pairs = np.stack([np.asarray(targets), np.asarray(predictions)], axis=1)
    images = np.bincount(pairs[:, 0], minlength=len(labels))
    wrong, counts = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0, return_counts=True)
    shares = counts / images[wrong[:, 0]]
    return [
        ConfusedPair(labels[wrong[i, 0]], labels[wrong[i, 1]], int(counts[i]), float(shares[i]))
        for i in np.argsort(-shares, kind="stable")[:limit]
    ]


def fit_temperature(logits: Tensor, labels: Tensor, largest: float = 10.0) -> float:
    """The temperature by which the probability of the first answer tells best how often that answer is right.

    Divides the logits (Guo et al. 2017, section 4.2). Chosen is the one of lowest `top_label_loss`, not, as there, of
    lowest cross-entropy: a network trained with label smoothing spreads probability over all classes, and what gives
    cross-entropy that back makes its first answers too sure. Few images, all classified right or wrong, say nothing
    of a temperature: so its logarithm is taken to be normal about 0, of `PRIOR_DEVIATION`, beforehand. That moves the
    temperature of 5,000 images by less than a thousandth.

    Args:
        logits: float32 [N, K] of the validation images.
        labels: int64 [N].
        largest: bound of the temperature; the inverse is the other.
    """
    logits = logits.double()

    def cost(log_temperature: float) -> float:
        prior = (log_temperature / PRIOR_DEVIATION) ** 2 / (2 * len(labels))
        return top_label_loss(logits / math.exp(log_temperature), labels) + prior

    best, bound = 0.0, math.log(largest)
    step = bound / 25
    while step > 1e-5:
        # The cost is smooth and need not be convex: all of the range first, then closer around the lowest.
        best = min((best + i * step for i in range(-25, 26) if abs(best + i * step) < bound + step / 2), key=cost)
        step /= 20
    return math.exp(best)


def top_label_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean log loss, nats, of the probability of the most likely class as that of its being right.

    Args:
        logits: float64 [N, K].
        labels: int64 [N].
    """
    others = logits.log_softmax(-1)
    confidence, predicted = others.max(-1)
    others = others.scatter(1, predicted[:, None], -math.inf).logsumexp(-1)
    return -torch.where(predicted == labels, confidence, others).mean().item()
