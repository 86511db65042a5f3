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
    model: nn.Module, preprocess: Preprocess, split: Split, batch_size: int = 500, autocast: torch.dtype | None = None
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
    index = (confidence * bins).long().clamp(max=bins - 1)
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


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes ``logits / temperature`` likeliest (Guo et al. 2017, section 4.2).

    Args:
        logits: float32 [N, K] of the validation pictures.
        labels: int64 [N].
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")
    logits = logits.double().cpu()
    labels = labels.cpu()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()
