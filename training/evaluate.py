"""Loss, top-1, top-5 and calibration of a model on a split."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from training.dataset import Split
from training.preprocessing import Preprocess

CALIBRATION_BINS = 15


class Metrics(BaseModel):
    """How good logits are on a split; fractions between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    n: int = Field(ge=1, description="pictures")
    top1: float = Field(description="share whose most likely class is the label")
    top5: float = Field(description="share whose label is among the five most likely classes")
    loss: float = Field(description="mean cross-entropy, nats")
    ece: float = Field(description=f"expected calibration error over {CALIBRATION_BINS} equal bins of confidence")


@torch.inference_mode()
def predict_logits(
    model: nn.Module, preprocess: Preprocess, split: Split, batch_size: int = 128, autocast: torch.dtype | None = None
) -> Tensor:
    """Logits of every picture, float32 [N, K], in order, on the split's device.

    Args:
        model: put into evaluation mode here, and back into the mode it was in.
        preprocess: to the model's input.
        split: uint8 pictures.
        batch_size: pictures at once.
        autocast: type of the forward pass; None for float32.
    """
    was_training = model.training
    model.eval()
    device = split.images.device.type
    with torch.autocast(device, autocast) if autocast else nullcontext():
        parts = [model(preprocess(images)).float() for images in split.images.split(batch_size)]
    model.train(was_training)
    return torch.cat(parts)


def calibration_bins(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> Tensor:
    """Reliability of the most likely class in equal bins of its probability (Guo et al. 2017).

    Returns:
        float64 [bins, 3]: share of the pictures, mean confidence, accuracy; zeros where a bin is empty.
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


def fit_temperature(logits: Tensor, labels: Tensor, largest: float = 10.0) -> float:
    """The temperature that makes ``logits / temperature`` likeliest (Guo et al. 2017, section 4.2).

    The loss is convex in the inverse temperature: bisection finds where its slope changes sign. With few pictures, all
    classified right (or wrong), it has no minimum; so the temperature stays between ``1 / largest`` and ``largest``.

    Args:
        logits: float32 [N, K] of the validation pictures.
        labels: int64 [N].
        largest: bound of the temperature.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None]).mean()
    low, high = 1 / largest, largest
    for _ in range(50):
        inverse = (low + high) / 2
        slope = ((logits * inverse).softmax(-1) * logits).sum(-1).mean() - of_label
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return 2 / (low + high)
