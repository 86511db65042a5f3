"""What moves while a run goes on, and how it is written to a checkpoint and read back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from training import checkpoint
from training.build_model import build_model
from training.checkpoint import CheckpointError, RunConfig
from training.distillation import Teacher
from training.evaluate import Metrics
from training.network import Network
from training.optim import Plateau, make_optimizers
from training.preprocessing import Preprocess


def seed_step(seed: int, *parts: int) -> None:
    """Seed torch's generators from the run's seed and, say, the step and the process."""
    text = "/".join(map(str, (seed, *parts)))
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


@dataclass
class TrainState:
    """A run's weights and counters.

    Attributes:
        run: its configuration.
        model: the weights that are trained.
        preprocess: before the model.
        optimizers: of the model.
        average: moving average of the weights, None where none is kept.
        loss_sum: float32 [], loss summed over the current epoch's steps.
        teachers: whose answers, in the mean, are part of the targets.
        plateau: what the validation losses have led to.
        epoch: finished epochs.
        step: finished steps.
        seconds: spent on the current epoch's steps.
        best_top1: highest validation top-1 so far.
        best_top1_loss: lowest validation loss of the epochs that had it, which decides between them.
    """

    run: RunConfig
    model: Network
    preprocess: Preprocess
    optimizers: list[Optimizer]
    average: AveragedModel | None
    loss_sum: Tensor
    teachers: list[Teacher] = field(default_factory=list)
    plateau: Plateau = field(default_factory=Plateau)
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_top1_loss: float = 0.0

    @torch.no_grad()
    def update_average(self) -> None:
        """As `AveragedModel.update_parameters`, which copies its counter to the device each time, and waits for it."""
        if self.average is None:
            return
        # Of n steps the average remembers a share of about n, and not the random weights that a short run began with
        # (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
        n = int(self.average.n_averaged)
        decay = min(self.run.train.ema_decay, (1 + n) / (10 + n)) if n else 0.0
        # Means and variances of norms are averaged with the weights that they are of.
        mine, theirs = (
            [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
            for module in (self.average.module, self.model)
        )
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.average.n_averaged += 1

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: their average where one is kept."""
        return self.average.module if self.average is not None else self.model

    @property
    def is_finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        return all(bool(weights.isfinite().all()) for weights in self.model.parameters())

    def record_validation(self, val: Metrics) -> bool:
        """Remember an epoch's figures; returns whether they are better than all before."""
        is_best = self.is_best(val)
        if (val.top1, -val.loss) > (self.best_top1, -self.best_top1_loss):
            self.best_top1, self.best_top1_loss = val.top1, val.loss
        self.plateau.update(val.loss, self.run.train)
        return is_best

    def is_best(self, val: Metrics) -> bool:
        """Whether these figures, not yet taken in, are better than all before."""
        if self.run.train.best_by == "top1":
            return (val.top1, -val.loss) > (self.best_top1, -self.best_top1_loss)
        return self.plateau.best_any is None or val.loss < self.plateau.best_any

    def save_best(self, path: Path, val: Metrics) -> None:
        """Write what is to be used: the weights that count."""
        checkpoint.save(path, self._weights(), checkpoint.make_header(self.run, self.epoch, self.step, val, {}))

    def save_last(self, path: Path, val: Metrics | None) -> None:
        """Write what is to be resumed from: everything.

        Args:
            path: of the checkpoint.
            val: figures of these weights; None within an epoch.
        """
        tensors = self._weights() | {"loss_sum": self.loss_sum}
        if self.average is not None:
            tensors |= checkpoint.add_prefix("raw", self.model.state_dict())
            tensors["average.n"] = self.average.n_averaged
        for i, teacher in enumerate(self.teachers):
            tensors |= checkpoint.add_prefix(f"teacher.{i}", teacher.state_dict())
        packed = [checkpoint.pack_optimizer(optimizer) for optimizer in self.optimizers]
        for i, (moments, _) in enumerate(packed):
            tensors |= checkpoint.add_prefix(f"optimizer.{i}", moments)
        state: dict[str, Any] = {
            "plateau": vars(self.plateau),
            "best_top1": self.best_top1,
            "best_top1_loss": self.best_top1_loss,
            "seconds": self.seconds,
            "optimizers": [scalars for _, scalars in packed],
        }
        checkpoint.save(path, tensors, checkpoint.make_header(self.run, self.epoch, self.step, val, state))

    def _weights(self) -> dict[str, Tensor]:
        model = checkpoint.add_prefix("model", self.evaluated.state_dict())
        return model | checkpoint.add_prefix("preprocess", self.preprocess.state_dict())

    def load_last(self, path: Path, images: int) -> None:
        """Go back to what `save_last` wrote.

        Args:
            path: of the checkpoint.
            images: how many there are to train on now.

        Raises:
            CheckpointError: it can't be read, or is not this run's.
        """
        tensors, header = checkpoint.load(path)
        if header.run.without_paths().model_dump() != self.run.without_paths().model_dump():
            raise CheckpointError(
                f"{path}: belongs to another configuration (preset {header.run.preset}) than "
                f"{path.with_name('config.json')} (preset {self.run.preset}); start a new run."
            )
        if "optimizers" not in header.state:
            raise CheckpointError(f"{path}: holds weights alone (as best does); to begin with them, use --init.")
        # Older runs tell the number of their images alone.
        began = header.state.get("pictures", images)
        if self.run.pictures_sha256 is None and began != images:
            raise CheckpointError(
                f"{path}: the run began with {began} training images, and now there are {images}; "
                "restore the data, or start a new run."
            )
        self._load_weights(tensors, path)
        for i, (optimizer, scalars) in enumerate(zip(self.optimizers, header.state["optimizers"], strict=True)):
            checkpoint.unpack_optimizer(optimizer, checkpoint.strip_prefix(f"optimizer.{i}", tensors), scalars)
        self.plateau = Plateau(**header.state["plateau"])
        self.best_top1, self.seconds = header.state["best_top1"], header.state["seconds"]
        # A run of before ties were decided goes on as it began: the earlier epoch stays.
        self.best_top1_loss = header.state.get("best_top1_loss", 0.0)
        self.loss_sum.copy_(tensors["loss_sum"])
        self.epoch, self.step = header.epoch, header.step

    def _load_weights(self, tensors: dict[str, Tensor], path: Path) -> None:
        weights = checkpoint.strip_prefix("model", tensors)
        checkpoint.load_into(self.preprocess, checkpoint.strip_prefix("preprocess", tensors), path)
        if self.average is not None:
            checkpoint.load_into(self.average.module, weights, path)
            self.average.n_averaged.copy_(tensors["average.n"])
            weights = checkpoint.strip_prefix("raw", tensors)
        checkpoint.load_into(self.model, weights, path)
        for i, teacher in enumerate(self.teachers):
            checkpoint.load_into(teacher, checkpoint.strip_prefix(f"teacher.{i}", tensors), path)


def initial_state(run: RunConfig, train: Tensor, val: Tensor, device: torch.device) -> TrainState:
    """The state before the first step, from the run's seed.

    Args:
        run: configuration.
        train: uint8 [B, H, W, 3], the training images.
        val: uint8 [B, H, W, 3], the validation images.
        device: to hold it.
    """
    checkpoint.git_commit()  # remembers it
    seed_step(run.train.seed)
    model = build_model(run.model)
    preprocess = Preprocess(run.model.image_size)
    # As the Keras example does, which adapts to all 50,000 images before it holds the last tenth out.
    preprocess.fit(train, val)
    model.to(device)
    return TrainState(
        run=run,
        model=model,
        preprocess=preprocess.to(device),
        optimizers=make_optimizers(model, run.train),
        average=AveragedModel(model) if run.train.ema_decay else None,
        loss_sum=torch.zeros((), device=device),
        teachers=[Teacher(origin).to(device) for origin in run.taught_by],
    )
