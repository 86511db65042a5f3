"""The training loop: epochs, validation, checkpoints, early stop, resume, time budget.

Everything random is a function of (`RunConfig.draw_seed`, step, process): a step seeds torch's generators anew. So a
run that stopped after any step goes on from its weights, its optimiser's state and the number of that step: bit for bit
on a CPU; a GPU sums in any order.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import RunConfig
from training.config import TrainConfig
from training.data import augment
from training.data.corruption import corrupt
from training.data.dataset import DataSet
from training.data.trivial_augment import trivial_augment
from training.distillation import Teacher, distillation_loss, mean_answer
from training.distributed import World
from training.evaluate import Metrics, measure, predict_logits
from training.metrics_log import MetricsEntry, append_metrics, truncate_after
from training.optim import clip_gradients, schedule_factor, set_learning_rates
from training.preprocessing import Preprocess
from training.report import log_epoch, log_stages, write_report
from training.report_schema import Report
from training.state import initial_state, seed_step
from training.transfer import load_initial_weights

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}

# To agree on stopping, the CPU waits for the GPU: not at every step.
CUDA_STEPS_BETWEEN_STOP_CHECKS = 20

# A stop waits for validation, and who asked may not: before one that takes longer, the epoch's steps are saved.
LONG_VALIDATION_S = 5.0


def epoch_order(seed: int, epoch: int, count: int, batch_size: int) -> Tensor:
    """The images of an epoch's batches, int64 [steps, batch_size].

    Every image comes once; the last batch is filled up from the epoch's beginning, so that all have one size.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    steps = math.ceil(count / batch_size)
    return order.repeat(math.ceil(steps * batch_size / count))[: steps * batch_size].view(steps, batch_size)


class TrainStep(nn.Module):
    """Images to loss: augment, preprocess, mix, forward, cross-entropy. What ``torch.compile`` compiles.

    Teachers see the same pixels, augmented, mixed and all (Beyer et al. 2022, section 3.1, "function matching"), but no
    corruption: they never learned to see through it, and their student should (Xie et al. 2020, section 2).
    """

    def __init__(
        self, model: nn.Module, preprocess: Preprocess, config: TrainConfig, teachers: Sequence[Teacher]
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.config = config
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images: Tensor, labels: Tensor, draws: augment.Draws, weight: Tensor | None) -> Tensor:
        """uint8 [B, H, W, 3], int64 [B], what was drawn -> mean loss, float32 []."""
        images = augment.flip_and_shift(images, draws)
        if self.config.trivial_augment:
            images = trivial_augment(images, draws.operation, draws.strength)
        seen = corrupt(images, draws.corruption, draws.severity) if self.config.corruption else images
        logits = self.model(self._pixels(self.preprocess, seen, draws, weight)).float()
        loss = augment.mixed_cross_entropy(logits, labels, weight, self.config.label_smoothing)
        if not self.teachers:
            return loss
        answer = self._answer_one if self.config.teachers_per_image == "one" else self._answer_all
        return distillation_loss(
            loss, logits, answer(images, draws, weight), self.config.distillation, self.config.distillation_temperature
        )

    def _answer_all(self, images: Tensor, draws: augment.Draws, weight: Tensor | None) -> Tensor:
        """The mean of all teachers' answers, as logits, float [B, K]."""
        return mean_answer(
            [teacher(self._pixels(teacher.preprocess, images, draws, weight)) for teacher in self.teachers]
        )

    def _answer_one(self, images: Tensor, draws: augment.Draws, weight: Tensor | None) -> Tensor:
        """Of each image one teacher's logits, float [B, K]; each teacher is asked about an equal part of the batch."""
        count = len(self.teachers)
        parts = [
            teacher(self._pixels(teacher.preprocess, images, draws, weight).tensor_split(count)[i])
            for i, teacher in enumerate(self.teachers)
            if i < len(images)
        ]
        return torch.cat(parts)

    def _pixels(self, preprocess: Preprocess, images: Tensor, draws: augment.Draws, weight: Tensor | None) -> Tensor:
        pixels: Tensor = preprocess(images)
        if self.config.random_crop:
            pixels = augment.crop(pixels, draws)
        if self.config.zoom:
            pixels = augment.zoom(pixels, draws)
        return pixels if weight is None else augment.mix(pixels, weight)


class Trainer:
    """One run: its state, and the methods that move it forward.

    Args:
        run: configuration; ``run.model`` and ``run.train`` are followed to the letter. Its precision is not "auto".
        data: its training and validation splits are moved to the device whole, unless they are mapped from files.
        folder: of the run; must exist.
        world: this process.

    Raises:
        ValueError: the batch can't be shared by the processes, or the device has no room for the images.
    """

    def __init__(self, run: RunConfig, data: DataSet, folder: Path, world: World) -> None:
        self.run, self.config, self.folder, self.world = run, run.train, folder, world
        self.share = world.share(self.config.batch_size)
        try:
            self.train_split, self.val_split = data.train.to(world.device), data.val.to(world.device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "too little memory on the device for the images, which all lie there: use fewer, a lower "
                "--input-size, or --device cpu."
            ) from error
        self.test_split = data.test
        self.state = initial_state(run, data.train.images, data.val.images, world.device)
        self.steps_per_epoch = math.ceil(len(data.train) / self.config.batch_size)
        self.train_step = self._make_train_step()
        self.stop_requested = False
        self.is_resumed = False
        self.validation_seconds = math.inf  # that the last one took; of the first nobody knows

    def _make_train_step(self) -> Callable[..., Tensor]:
        model: nn.Module = self.state.model
        if self.world.size > 1:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices)
        step = TrainStep(model, self.state.preprocess, self.config, self.state.teachers)
        return torch.compile(step) if self.config.compile else step

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of the forward pass, None for float32."""
        return AUTOCAST[self.config.precision]

    @property
    def evaluation_batch(self) -> int:
        """Images at once where no gradients are needed, nor the activations that training keeps for them."""
        return 2 * (self.share.stop - self.share.start)

    # ---- steps and epochs

    def one_step(self, indices: Tensor) -> None:
        """Train on one batch of the whole world's images.

        Args:
            indices: int64 [batch_size] on the device, the same in every process.
        """
        state, config, device = self.state, self.config, self.world.device
        seed_step(self.run.draw_seed, state.step)
        draws = augment.draw(config, len(indices)).share(self.share, device)
        weight = augment.draw_mix(config, self.run.model.image_size)
        # From here on dropout draws, and differs between processes.
        seed_step(self.run.draw_seed, state.step, self.world.rank)
        total = config.epochs * self.steps_per_epoch
        factor = schedule_factor(config, state.step, total, self.steps_per_epoch) * state.plateau.factor
        set_learning_rates(state.optimizers, factor)
        part = indices[self.share]
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            loss = self.train_step(
                self.train_split.images[part.to(self.train_split.images.device)].to(device, non_blocking=True),
                self.train_split.labels[part],
                draws,
                None if weight is None else weight.to(device, non_blocking=True),
            )
        loss.backward()
        clip_gradients(state.model, config.clip_norm)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.update_average()
        state.loss_sum += loss.detach()
        state.step += 1

    def train_epoch(self, should_stop: Callable[[], bool]) -> bool:
        """Train to the end of the current epoch; False when asked to stop before it."""
        state = self.state
        done = state.step - state.epoch * self.steps_per_epoch
        order = epoch_order(self.run.draw_seed, state.epoch, len(self.train_split), self.config.batch_size)
        state.model.train()
        start = time.perf_counter()
        with self._progress(done) as bar:
            for indices in order.to(self.world.device)[done:]:
                self.one_step(indices)
                bar.update(self.config.batch_size)
                if should_stop():
                    break
        self.world.synchronize()
        state.seconds += time.perf_counter() - start
        return state.step == (state.epoch + 1) * self.steps_per_epoch

    def _progress(self, done: int) -> tqdm:
        """A bar for the epoch, of which ``done`` steps are done; sparing where nobody watches, as in a log file."""
        images = self.config.batch_size
        return tqdm(
            desc=f"epoch {self.state.epoch + 1}/{self.config.epochs}",
            total=self.steps_per_epoch * images,
            initial=done * images,
            unit=" images",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            leave=False,
            disable=not self.world.is_main,
        )

    def finish_epoch(self) -> bool:
        """Validate, move the schedule on, write metrics and checkpoints; False when a signal stopped the validation."""
        state = self.state
        train_loss = self._finite_loss() / self.steps_per_epoch
        if self.world.is_main and self.validation_seconds > LONG_VALIDATION_S and state.is_finite:
            state.save_last(self.folder / "last.safetensors", None)
        # One process measures, and the others learn from it whether the run ends.
        val = self.world.broadcast(self.validate() if self.world.is_main else None)
        if val is None:
            return False
        state.epoch += 1
        if not math.isfinite(val.loss):
            raise FloatingPointError(self._diverged("validation", val.loss))
        state.loss_sum.zero_()
        is_best = state.record_validation(val)
        seconds, state.seconds = state.seconds, 0.0
        if self.world.is_main:
            append_metrics(self.folder, self._metrics_entry(train_loss, val, seconds))
            if is_best:
                state.save_best(self.folder / "best.safetensors", val)
            state.save_last(self.folder / "last.safetensors", val)
        return True

    def keep_initial(self) -> bool:
        """Validate and keep the weights that the run begins with; False when a signal stopped the validation."""
        val = self.world.broadcast(self.validate() if self.world.is_main else None)
        if val is None:
            return False
        if self.world.is_main:
            self.state.save_best(self.folder / "best.safetensors", val)
            self.state.save_last(self.folder / "last.safetensors", val)
        return True

    def _metrics_entry(self, train_loss: float, val: Metrics, seconds: float) -> MetricsEntry:
        return {
            "epoch": self.state.epoch,
            "step": self.state.step,
            "train_loss": train_loss,
            "val_loss": val.loss,
            "val_top1": val.top1,
            "val_top5": val.top5,
            "learning_rate": self.state.optimizers[0].param_groups[0]["lr"],
            "pictures_per_second": self.steps_per_epoch * self.config.batch_size / seconds,
            "seconds": seconds,
            "device": self.world.hardware,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
        }

    def _finite_loss(self) -> float:
        """The epoch's summed loss, mean of the processes; from now on that of each, so that one can write it down.

        Raises:
            FloatingPointError: it isn't finite.
        """
        self.state.loss_sum = self.world.mean(self.state.loss_sum)
        loss = self.state.loss_sum.item()
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged("training", loss))
        return loss

    def _diverged(self, which: str, loss: float) -> str:
        epoch = math.ceil(self.state.step / self.steps_per_epoch)
        return f"the {which} loss became {loss} in epoch {epoch}: lower --learning-rate, or set --clip-norm 1."

    def validate(self) -> Metrics | None:
        """Figures of the evaluated weights on the validation images; None when a signal stops it before the end."""
        state, size = self.state, self.evaluation_batch
        start = time.perf_counter()
        logits: list[Tensor] = []
        for batch in self.val_split.batches(size):
            if self.stop_requested:
                return None
            logits.append(predict_logits(state.evaluated, state.preprocess, batch, size, self.autocast))
        metrics = measure(torch.cat(logits), self.val_split.labels, "val")
        self.validation_seconds = time.perf_counter() - start
        return metrics

    # ---- the run

    def resume(self) -> None:
        """Go back to where ``last`` was written.

        Raises:
            CheckpointError: there is none, or it is not this run's.
        """
        self.state.load_last(self.folder / "last.safetensors", len(self.train_split))
        self.is_resumed = True

    def load_origins(self, inits: Sequence[Path], teachers: Sequence[Path]) -> None:
        """Take the weights of other runs before the first step.

        Args:
            inits: the checkpoints of ``run.inits``; see `training.transfer.load_initial_weights`.
            teachers: those of ``run.teachers``; without them ``inits`` teach, where the run has teachers.

        Raises:
            CheckpointError: one can't be read, or is another one by now.
        """
        if inits:
            load_initial_weights(self.state.model, self.run, inits)
        for teacher, path in zip(self.state.teachers, teachers or inits, strict=bool(self.state.teachers)):
            teacher.load_weights(path)

    def fit(self, deadline: float | None = None, max_steps: int | None = None) -> bool:
        """Train until done or told to stop; writes ``last`` either way.

        Args:
            deadline: `time.monotonic` at which to stop.
            max_steps: stop after so many steps of the whole run.

        Returns:
            Whether the run came to its end (all epochs, or early stop).

        Raises:
            FloatingPointError: the loss is no longer finite; a sentence for the user.
        """

        def should_stop() -> bool:
            if max_steps is not None and self.state.step >= max_steps:
                return True  # in every process: nothing to agree on
            pause = CUDA_STEPS_BETWEEN_STOP_CHECKS if self.world.device.type == "cuda" else 1
            if self.world.size > 1 and self.state.step % pause:
                return False
            return self.world.any(self.stop_requested or (deadline is not None and time.monotonic() >= deadline))

        # A run that is resumed has kept them: written again, with another time, they would have another digest.
        if self.config.epochs == 0 and not self.is_resumed and not self.keep_initial():
            return False
        with self._events() as events:
            while self.state.epoch < self.config.epochs and not self.state.plateau.should_stop(self.config):
                if should_stop() or not self.train_epoch(should_stop) or not self.finish_epoch():
                    self._finite_loss()
                    if self.world.is_main:
                        self.state.save_last(self.folder / "last.safetensors", None)
                    self.world.barrier()  # torchrun gives the others 30 s once one process has ended
                    return False
                if events is not None:
                    log_epoch(self.folder, events, self.run)
        return True

    def _events(self) -> SummaryWriter | nullcontext[None]:
        """TensorBoard's events; those of epochs that are trained again are hidden, and their lines dropped."""
        if not self.world.is_main:
            return nullcontext()
        truncate_after(self.folder, self.state.epoch)
        log_stages(self.folder, self.run)
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.state.epoch + 1)

    def report(self) -> Report:
        """Measure the best weights, and the test images by them; see `training.report.write_report`."""
        splits = (self.train_split, self.val_split, self.test_split)
        return write_report(self.folder, *splits, self.world.device, self.evaluation_batch)
