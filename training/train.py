"""The training loop: epochs, validation, checkpoints, early stop, resume, time budget.

Everything random is a function of (seed, step, process): a step seeds torch's generators anew. So a run that stopped
after any step goes on bit for bit from its weights, its optimiser's state and the number of that step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import augment, checkpoint
from training.checkpoint import CheckpointError, RunConfig
from training.config import TrainConfig
from training.dataset import DataSet
from training.distributed import World
from training.evaluate import Metrics, fit_temperature, measure, predict_logits
from training.model import Perceiver, count_parameters
from training.optim import Plateau, clip_gradients, make_optimizers, schedule_factor, set_learning_rates
from training.plots import save_curves, save_reliability
from training.preprocessing import Preprocess

# Processes agree on stopping only so often: the agreement waits for all of them.
STEPS_BETWEEN_STOP_CHECKS = 20


def seed_step(seed: int, *parts: int) -> None:
    """Seed torch's generators from the run's seed and, say, the step and the process."""
    text = "/".join(map(str, (seed, *parts)))
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


def epoch_order(seed: int, epoch: int, count: int, batch_size: int) -> Tensor:
    """The pictures of an epoch's batches, int64 [steps, batch_size].

    Every picture comes once; the last batch is filled up from the epoch's beginning, so that all have one size.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    steps = math.ceil(count / batch_size)
    return order.repeat(math.ceil(steps * batch_size / count))[: steps * batch_size].view(steps, batch_size)


class TrainStep(nn.Module):
    """Pictures to loss: preprocess, zoom, mix, forward, cross-entropy. What ``torch.compile`` compiles."""

    def __init__(self, model: nn.Module, preprocess: Preprocess, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.config = config

    def forward(self, images: Tensor, labels: Tensor, draws: augment.Draws, mix: augment.Mix | None) -> Tensor:
        """uint8 [B, H, W, 3], int64 [B] -> mean loss, float32 []."""
        pixels = self.preprocess(augment.flip_and_shift(images, draws))
        if self.config.zoom:
            pixels = augment.zoom(pixels, draws)
        share = 1.0
        if mix is not None:
            pixels, share = augment.apply_mix(pixels, mix)
        logits = self.model(pixels).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        if share == 1.0:
            return loss
        other = F.cross_entropy(logits, labels.roll(1, 0), label_smoothing=self.config.label_smoothing)
        return share * loss + (1 - share) * other


class Trainer:
    """One run: its state, and the methods that move it forward.

    Args:
        run: configuration; ``run.model`` and ``run.train`` are followed to the letter.
        data: its splits are moved to the device whole.
        folder: of the run; made if need be.
        world: this process.
    """

    def __init__(self, run: RunConfig, data: DataSet, folder: Path, world: World) -> None:
        self.run, self.folder, self.world = run, folder, world
        self.config = run.train
        if self.config.batch_size % world.size:
            raise ValueError(
                f"batch_size {self.config.batch_size} can't be shared by {world.size} processes; make it a multiple."
            )
        self.train_split = data.train.to(world.device)
        self.val_split = data.val.to(world.device)
        self.test_split = data.test
        seed_step(self.config.seed)
        self.model = Perceiver(run.model)
        self.preprocess = Preprocess(run.model.image_size)
        # As the Keras example does, which adapts to all 50,000 pictures before it holds the last tenth out.
        self.preprocess.fit(data.train.images, data.val.images)
        self.model.to(world.device)
        self.preprocess.to(world.device)
        self.optimizers = make_optimizers(self.model, self.config)
        self.average = self._make_average()
        self.plateau = Plateau()
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.best_top1 = -1.0
        self.loss_sum = torch.zeros((), device=world.device)
        trained: nn.Module = self.model
        if world.size > 1:
            trained = DistributedDataParallel(
                self.model, device_ids=[world.device] if world.device.index is not None else None
            )
        self.train_step: Callable[..., Tensor] = TrainStep(trained, self.preprocess, self.config)
        if self.config.compile:
            self.train_step = torch.compile(self.train_step)
        self.steps_per_epoch = math.ceil(len(data.train) / self.config.batch_size)
        self.stop_requested = False

    def _make_average(self) -> AveragedModel | None:
        if not self.config.ema_decay:
            return None
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema_decay))

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: their average where one is kept."""
        return self.average.module if self.average is not None else self.model

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of the forward pass, None for float32."""
        return torch.bfloat16 if self.config.precision == "bfloat16" else None

    # ---- steps and epochs

    def one_step(self, indices: Tensor) -> None:
        """Train on one batch of the whole world's pictures.

        Args:
            indices: int64 [batch_size], the same in every process.
        """
        seed_step(self.config.seed, self.step)
        share = self.world.share(len(indices))
        draws = augment.draw(self.config, len(indices)).share(share, self.world.device)
        mix = augment.draw_mix(self.config)
        # From here on dropout draws, and differs between processes.
        seed_step(self.config.seed, self.step, self.world.rank)
        part = indices[share].to(self.world.device, non_blocking=True)
        total = self.config.epochs * self.steps_per_epoch
        factor = schedule_factor(self.config, self.step, total, self.steps_per_epoch) * self.plateau.factor
        set_learning_rates(self.optimizers, factor)
        with torch.autocast(self.world.device.type, self.autocast) if self.autocast else nullcontext():
            loss = self.train_step(self.train_split.images[part], self.train_split.labels[part], draws, mix)
        loss.backward()
        clip_gradients(self.model, self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.loss_sum += loss.detach()
        self.step += 1

    def train_epoch(self, should_stop: Callable[[], bool]) -> bool:
        """Train to the end of the current epoch; False when asked to stop before it."""
        done = self.step - self.epoch * self.steps_per_epoch
        order = epoch_order(self.config.seed, self.epoch, len(self.train_split), self.config.batch_size)
        self.model.train()
        start = time.perf_counter()
        pictures = self.config.batch_size
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        total = len(order) * pictures
        with tqdm(
            total=total, initial=done * pictures, desc=title, unit=" pictures", unit_scale=True,
            disable=not self.world.is_main, mininterval=0.5, leave=False,
        ) as bar:  # fmt: skip
            for indices in order[done:]:
                self.one_step(indices)
                bar.update(pictures)
                if (self.world.size == 1 or self.step % STEPS_BETWEEN_STOP_CHECKS == 0) and self.world.any(
                    should_stop()
                ):
                    break
        self.seconds += time.perf_counter() - start
        return self.step == (self.epoch + 1) * self.steps_per_epoch

    def finish_epoch(self) -> dict[str, Any]:
        """Validate, move the schedule on, write metrics and checkpoints; returns the epoch's line."""
        loss = (self.world.mean(self.loss_sum) / self.steps_per_epoch).item()
        self.loss_sum.zero_()
        self.epoch += 1
        val: Metrics | None = None
        if self.world.is_main:
            val = self.validate()
        val = self.world.broadcast(val)
        assert val is not None
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in epoch {self.epoch}: lower --learning-rate, or set --clip-norm 1."
            )
        self.plateau.update(val.loss, self.config)
        line = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss,
            "val_loss": val.loss,
            "val_top1": val.top1,
            "val_top5": val.top5,
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "pictures_per_second": self.steps_per_epoch * self.config.batch_size / self.seconds,
            "seconds": self.seconds,
        }
        self.seconds = 0.0
        if self.world.is_main:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if val.top1 > self.best_top1:
                self.best_top1 = val.top1
                self.save("best", val)
            self.save("last", val)
        return line

    def validate(self) -> Metrics:
        """Figures of the evaluated weights on the validation pictures."""
        logits = predict_logits(self.evaluated, self.preprocess, self.val_split, autocast=self.autocast)
        return measure(logits, self.val_split.labels, "val")

    # ---- checkpoints

    def save(self, name: str, val: Metrics | None = None) -> None:
        """Write ``best`` (what to use) or ``last`` (what to resume from as well)."""
        tensors = checkpoint.prefixed("model", self.evaluated.state_dict())
        tensors |= checkpoint.prefixed("preprocess", self.preprocess.state_dict())
        state: dict[str, Any] = {}
        if name == "last":
            if self.average is not None:
                tensors |= checkpoint.prefixed("raw", self.model.state_dict())
                tensors["average.n"] = self.average.n_averaged
            tensors["loss_sum"] = self.loss_sum
            state = {
                "plateau": vars(self.plateau),
                "best_top1": self.best_top1,
                "seconds": self.seconds,
                "optimizers": [],
            }
            for i, optimizer in enumerate(self.optimizers):
                packed, scalars = checkpoint.pack_optimizer(optimizer)
                tensors |= checkpoint.prefixed(f"optimizer.{i}", packed)
                state["optimizers"].append(scalars)
        header = checkpoint.make_header(self.run, self.epoch, self.step, val, state)
        checkpoint.save(self.folder / f"{name}.safetensors", tensors, header)

    def resume(self) -> None:
        """Go back to where ``last`` was written.

        Raises:
            CheckpointError: there is none, or it is not this run's.
        """
        path = self.folder / "last.safetensors"
        tensors, header = checkpoint.load(path)
        if header.run != self.run:
            raise CheckpointError(
                f"{path}: belongs to another configuration than {self.folder / 'config.json'}; start a new run."
            )
        weights = checkpoint.under("model", tensors)
        checkpoint.load_into(self.preprocess, checkpoint.under("preprocess", tensors), path)
        if self.average is not None:
            checkpoint.load_into(self.average.module, weights, path)
            self.average.n_averaged.copy_(tensors["average.n"])
            weights = checkpoint.under("raw", tensors)
        checkpoint.load_into(self.model, weights, path)
        for i, (optimizer, packed) in enumerate(zip(self.optimizers, header.state["optimizers"], strict=True)):
            checkpoint.unpack_optimizer(optimizer, checkpoint.under(f"optimizer.{i}", tensors), packed)
        self.plateau = Plateau(**header.state["plateau"])
        self.best_top1, self.seconds = header.state["best_top1"], header.state["seconds"]
        self.loss_sum.copy_(tensors["loss_sum"])
        self.epoch, self.step = header.epoch, header.step
        self._forget_lines_after(self.epoch)

    def _forget_lines_after(self, epoch: int) -> None:
        """Drop lines that were written after the checkpoint, by a run killed between the two."""
        path = self.folder / "metrics.jsonl"
        if self.world.is_main and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["epoch"] <= epoch]
            path.write_text("".join(line + "\n" for line in kept))

    # ---- the run

    def fit(self, deadline: float | None = None, max_steps: int | None = None) -> bool:
        """Train until done or told to stop; writes ``last`` either way.

        Args:
            deadline: `time.monotonic` at which to stop.
            max_steps: stop after so many steps of the whole run.

        Returns:
            Whether the run came to its end (all epochs, or early stop).
        """

        def should_stop() -> bool:
            late = deadline is not None and time.monotonic() >= deadline
            return self.stop_requested or late or (max_steps is not None and self.step >= max_steps)

        with SummaryWriter(str(self.folder / "tensorboard")) if self.world.is_main else nullcontext() as events:
            while self.epoch < self.config.epochs and not self.plateau.should_stop(self.config):
                if self.world.any(should_stop()) or not self.train_epoch(should_stop):
                    if self.world.is_main:
                        self.save("last")
                    return False
                line = self.finish_epoch()
                if events is not None:
                    self._announce(line, events)
        return True

    def _announce(self, line: dict[str, Any], events: SummaryWriter) -> None:
        for key, value in line.items():
            if key not in ("epoch", "step"):
                events.add_scalar(key, value, line["epoch"])
        save_curves([json.loads(row) for row in (self.folder / "metrics.jsonl").open()], self.folder / "curves.png")
        tqdm.write(
            f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
            f"top-1 {line['val_top1']:.2%}  top-5 {line['val_top5']:.2%}  {line['pictures_per_second']:.0f} pictures/s"
        )

    def report(self) -> dict[str, Any]:
        """Measure ``best`` in float32: temperature on the validation pictures, figures on the test pictures, read once."""
        path = self.folder / "best.safetensors"
        model, preprocess, header = checkpoint.load_model(path)
        model.to(self.world.device)
        preprocess.to(self.world.device)
        val_logits = predict_logits(model, preprocess, self.val_split)
        temperature = fit_temperature(val_logits, self.val_split.labels)
        result: dict[str, Any] = {
            "preset": self.run.preset,
            "dataset": self.run.dataset,
            "parameters": count_parameters(model),
            "epoch": header.epoch,
            "temperature": temperature,
            "checkpoint_sha256": checkpoint.digest(path),
            "val": measure(val_logits, self.val_split.labels, "val").model_dump(),
            "test": None,
        }
        if self.test_split is not None:
            split = self.test_split.to(self.world.device)
            logits = predict_logits(model, preprocess, split)
            # Dividing by the temperature changes no order: top-1 and top-5 are those of both.
            result["test_uncalibrated"] = measure(logits, split.labels, "test").model_dump()
            result["test"] = measure(logits / temperature, split.labels, "test").model_dump()
        (self.folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
        return result
