"""Optimisers from well-kept packages, parameter groups, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_optimizer import Lamb
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from training.config import TrainConfig


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weight of a dense layer (not an embedding, the latents, a bias or a norm)."""
    return parameter.ndim == 2 and name.endswith(".weight")


class CorrectedLamb(Lamb):
    """LAMB (You et al. 2020, algorithm 2) with bias correction, as TensorFlow Addons has it; the step is the package's.

    The package leaves the bias corrections out. They matter where the trust ratio is 1, as for every bias, which
    starts at zero: its first step would be 3.2 times as large, and all later ones are in proportion to what it has
    become. They also say how much the decay weighs beside the Adam term. A moment with decay b, divided by
    ``1 - b^t``, is the moment with decay ``b (1 - b^(t-1)) / (1 - b^t)`` at step t; so that is set before each step.

    Beside that the package's defaults are another variant. Set here: weight decay as part of the update whose norm the
    trust ratio takes, no clipping of gradients or weight norms, no division of the step by ``1 - beta1^t``.

    Args:
        groups: parameters and their ``weight_decay``.
        lr: learning rate.
    """

    clamp = math.inf
    uncorrected_betas = (0.9, 0.999)

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        betas = self.uncorrected_betas
        super().__init__(groups, lr, betas, eps=1e-6, weight_decouple=False, max_grad_norm=0.0, adam_debias=True)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            t = group.get("step", 0) + 1
            group["betas"] = tuple(b * (1 - b ** (t - 1)) / (1 - b**t) for b in self.uncorrected_betas)
        return super().step(closure)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """The optimisers of a model: one, or Muon for the dense layers and AdamW for the rest.

    Args:
        model: its parameters' names decide their group.
        config: optimiser, learning rates, weight decay.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if is_matrix(n, p)]
    rest = [p for n, p in named if not is_matrix(n, p)]
    decay, rate = config.weight_decay, config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": rest, "weight_decay": decay if config.decay_all else 0.0},
    ]
    fused = next(model.parameters()).device.type == "cuda"
    if config.optimizer == "lamb":
        return [CorrectedLamb(groups, rate)]
    if config.optimizer == "adamw":
        return [AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=fused)]
    # The classifier's matrix maps to classes, not to features: Muon's authors leave it to AdamW, as embeddings are.
    head = [p for n, p in named if is_matrix(n, p) and n.startswith("head.")]
    matrices = [p for n, p in named if is_matrix(n, p) and not n.startswith("head.")]
    others: list[dict[str, Any]] = [{"params": head, "weight_decay": decay}, groups[1]]
    return [
        Muon(matrices, lr=rate, weight_decay=decay, momentum=0.95, nesterov=True),
        AdamW(others, lr=config.adamw_learning_rate, betas=(0.9, 0.99), fused=fused),
    ]


def schedule_factor(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """What the peak learning rate is multiplied with at a step (cosine and linear; 1 for plateau).

    Args:
        config: which schedule, warm-up in epochs.
        step: 0-based.
        total_steps: of the whole run.
        steps_per_epoch: of one epoch.
    """
    if config.schedule == "plateau":
        return 1.0
    # At most half of the run, which would else end before it had its peak rate.
    warmup = min(config.warmup_epochs * steps_per_epoch, total_steps / 2)
    if step < warmup:
        return min((step + 1) / warmup, 1.0)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress


@dataclass
class Plateau:
    """Reduce on plateau and early stopping on the validation loss, as Keras' two callbacks do it.

    Keras' ``ReduceLROnPlateau`` counts only falls of more than ``min_delta``; its ``EarlyStopping`` counts any fall.
    """

    factor: float = 1.0
    best: float | None = None  # not infinity, which JSON has not
    bad_epochs: int = 0
    best_any: float | None = None
    bad_epochs_any: int = 0

    def update(self, loss: float, config: TrainConfig) -> None:
        """Take in the validation loss of an epoch."""
        if self.best_any is None or loss < self.best_any:
            self.best_any, self.bad_epochs_any = loss, 0
        else:
            self.bad_epochs_any += 1
        if self.best is None or loss < self.best - config.plateau_threshold:
            self.best, self.bad_epochs = loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs >= config.plateau_patience and config.schedule == "plateau":
            self.factor *= config.plateau_factor
            self.bad_epochs = 0

    def should_stop(self, config: TrainConfig) -> bool:
        """Whether the loss has rested for ``early_stop_patience`` epochs."""
        return 0 < config.early_stop_patience <= self.bad_epochs_any


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group to its peak rate times ``factor``; the peak is remembered in the group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor


def clip_gradients(model: nn.Module, norm: float) -> None:
    """Scale the gradients down to a norm of at most ``norm``; 0 leaves them alone."""
    if norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
