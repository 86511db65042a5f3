"""A model, a data set and a run so small that an epoch takes milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.checkpoint import Origin, RunConfig
from training.config import ModelConfig, TrainConfig
from training.data.dataset import DataSet, Split
from training.distributed import World

LABELS = ("ant", "bee", "cat")
ALONE = World(0, 1, torch.device("cpu"))
MODEL = {
    "num_classes": 3,
    "input_size": 8,
    "image_size": 8,
    "dim": 16,
    "token_dim": 16,
    "num_latents": 4,
    "num_blocks": 1,
    "cross_heads": 2,
    "cross_head_dim": 8,
    "self_heads": 2,
    "self_head_dim": 8,
}
# As flags, over `compact`. What the data decides is none.
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in MODEL.items() if name != "num_classes"]
DROPOUT = {"attention_dropout": 0.1, "ffn_dropout": 0.2, "logits_dropout": 0.1, "drop_path": 0.2, "latent_dropout": 0.5}


def make_split(count: int, seed: int) -> Split:
    """``count`` noisy images, the classes in turn, each class of a brightness that mostly tells it."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(LABELS)
    images = generator.normal(70 + 50 * labels[:, None, None, None], 40, (count, 8, 8, 3)).clip(0, 255)
    return Split(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def data_set(train: int = 40, val: int = 12, test: int | None = 9) -> DataSet:
    return DataSet(
        name="tiny",
        labels=LABELS,
        train=make_split(train, 1),
        val=make_split(val, 2),
        test=None if test is None else make_split(test, 3),
    )


def run_config(model: dict[str, object] | None = None, **train: object) -> RunConfig:
    """A run of the tiny model, three epochs of batches of eight unless told otherwise."""
    return RunConfig(
        preset="compact",
        data=None,
        dataset="tiny",
        labels=LABELS,
        model=ModelConfig.model_validate(MODEL | (model or {})),
        train=TrainConfig.model_validate({"epochs": 3, "batch_size": 8} | train),
    )


def with_teacher(run: RunConfig) -> RunConfig:
    """The run as one that learns half of its targets from a model of its own architecture."""
    origin = Origin(checkpoint_sha256="0" * 64, epoch=1, git_commit=None, run=run)
    train = run.train.model_copy(update={"distillation": 0.5})
    return run.model_copy(update={"init": origin, "train": train})


def write_images(folder: Path, train: int = 24, val: int = 9, test: int = 6) -> Path:
    """The tiny data set as an image folder with splits."""
    for name, count, seed in (("train", train, 1), ("val", val, 2), ("test", test, 3)):
        split = make_split(count, seed) if count else Split(torch.empty(0), torch.empty(0))
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = folder / name / LABELS[int(label)] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    return folder
