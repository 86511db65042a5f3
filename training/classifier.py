"""A trained model in a notebook: load it, classify arrays and files, take its features, train it on.

Shape letters: N images, H and W their size in pixels, K classes, C channels of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from imaging.resize import resize_images
from training import checkpoint
from training.build_model import build_model
from training.checkpoint import RunConfig
from training.config import ModelConfig, TrainConfig
from training.data import augment
from training.data.image_files import read_image
from training.network import Network
from training.optim import clip_gradients, make_optimizers
from training.preprocessing import Preprocess
from training.report_schema import read_report
from training.train import TrainStep, epoch_order
from training.transfer import find_checkpoint, load_initial_weights, read_origin

Image = Path | str | NDArray[np.uint8]
Prediction = list[tuple[str, float]]

BATCH_SIZE = 128
# What `train_epoch` does unless it is told otherwise: little enough for weights that know something.
FINE_TUNING = TrainConfig(optimizer="adamw", learning_rate=3e-4, batch_size=16, clip_norm=1.0, crop_padding=2)


class Classifier:
    """A model with its preprocessing, labels and temperature.

    Args:
        run: configuration of the model, and its labels.
        model: of that configuration.
        preprocess: stored pixels to its input.
        temperature: what divides the logits.
    """

    def __init__(self, run: RunConfig, model: Network, preprocess: Preprocess, temperature: float = 1.0) -> None:
        self.run, self.temperature = run, temperature
        self.model, self.preprocess = model.eval(), preprocess
        self._optimizers: list[Optimizer] = []
        self._config: TrainConfig | None = None
        self._epochs = 0

    @classmethod
    def from_pretrained(
        cls, path: Path | str, labels: Sequence[str] | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a model.

        Args:
            path: a run's folder, a model folder (its newest version), or a ``.safetensors`` file.
            labels: classes to learn in place of the model's own, with a fresh head.
            device: to compute on.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        file = find_checkpoint(Path(path))
        model, preprocess, header = checkpoint.load_model(file)
        report, run = read_report(file.parent), header.run
        of_these = report is not None and report.checkpoint_sha256 == checkpoint.digest(file)
        temperature = report.temperature if report is not None and of_these else 1.0
        if labels is not None and tuple(labels) != run.labels:
            new = {"labels": tuple(labels), "superclasses": None, "superclass_names": None, "init": read_origin(file)}
            config = ModelConfig.model_validate(run.model.model_dump() | {"num_classes": len(labels)})
            run = run.model_copy(update={**new, "model": config, "averaged": (), "teachers": (), "stage": None})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # of the head
                model, temperature = build_model(config), 1.0
            load_initial_weights(model, run, [file])
        return cls(run, model.to(device), preprocess.to(device), temperature)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.run.labels

    def read(self, images: Sequence[Image] | NDArray[np.uint8]) -> Tensor:
        """Bring images to the model's size as the service does: files, or uint8 [H, W, 3] arrays, RGB, 0..255.

        Returns:
            uint8 [N, input_size, input_size, 3] on the model's device.

        Raises:
            DataError: a file is no readable image.
            ValueError: an array is no such image, or there is none.
        """
        size = self.run.model.input_size

        def to_size(image: Image) -> NDArray[np.uint8]:
            if isinstance(image, Path | str):
                return read_image(Path(image), size)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}.")
            return resize_images(image[None], size)[0]

        if len(images) == 0:
            raise ValueError("there must be one image at least.")
        return torch.from_numpy(np.stack([to_size(image) for image in images])).to(self.preprocess.mean.device)

    @torch.no_grad()
    def logits(self, images: Sequence[Image] | NDArray[np.uint8]) -> Tensor:
        """Calibrated logits, float32 [N, K] on the CPU; their softmax is the probabilities. Images as in `read`."""
        parts = [self.model(self.preprocess(part)) for part in self.read(images).split(BATCH_SIZE)]
        return torch.cat(parts).float().cpu() / self.temperature

    @torch.no_grad()
    def features(self, images: Sequence[Image] | NDArray[np.uint8]) -> Tensor:
        """What the head classifies, float32 [N, C] on the CPU; of two views their mean. Images as in `read`."""
        parts = [
            self.model.forward_with_features(self.preprocess(part))[1] for part in self.read(images).split(BATCH_SIZE)
        ]
        return torch.cat(parts).float().cpu()

    def predict(self, images: Sequence[Image] | NDArray[np.uint8], top_k: int = 1) -> list[Prediction]:
        """The most likely labels of each image with their probabilities, the first one first. Images as in `read`."""
        values, indices = self.logits(images).softmax(-1).topk(min(top_k, len(self.labels)))
        return [
            [(self.labels[index], value) for index, value in zip(*row, strict=True)]
            for row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def train_epoch(
        self,
        images: Sequence[Image] | NDArray[np.uint8],
        labels: Sequence[str],
        config: TrainConfig = FINE_TUNING,
    ) -> float:
        """Train on each image once, augmented, at a constant learning rate; the same each time from the same weights.

        Args:
            images: as in `read`.
            labels: of each image, among the classifier's.
            config: recipe; its epochs, schedule, distillation and average are not followed.

        Returns:
            Mean loss, nats.

        Raises:
            ValueError: there are other labels, or not as many as images.
        """
        unknown = set(labels) - set(self.labels)
        if unknown or len(labels) != len(images):
            wrong = f"{sorted(unknown)} are not" if unknown else f"{len(labels)} labels of {len(images)} images are not"
            raise ValueError(f"{wrong} what this classifier takes: one of its labels for each image.")
        pixels = self.read(images)
        targets = torch.tensor([self.labels.index(label) for label in labels], device=pixels.device)
        if self._config != config:
            self._optimizers, self._config = make_optimizers(self.model, config), config
        step = TrainStep(self.model.train(), self.preprocess, config, ())
        losses = []
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + self._epochs)
                for chosen in epoch_order(config.seed, self._epochs, len(targets), config.batch_size).to(pixels.device):
                    draws = augment.draw(config, len(chosen)).share(slice(None), pixels.device)
                    mix = augment.draw_mix(config, self.run.model.image_size)
                    loss = step(pixels[chosen], targets[chosen], draws, None if mix is None else mix.to(pixels.device))
                    loss.backward()
                    clip_gradients(self.model, config.clip_norm)
                    for optimizer in self._optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    losses.append(loss.item())
        finally:  # also of an interrupt, behind which a notebook goes on
            self.model.eval()
        self._epochs += 1
        return sum(losses) / len(losses)
