"""A tiny run as `python -m training` leaves it, made by the project's own writer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from PIL import Image
from torch import nn

from export import build
from export.graph.to_onnx import to_onnx
from training import checkpoint
from training.checkpoint import RunConfig
from training.config import ModelConfig, TrainConfig
from training.evaluate import Confidence, ConfusedPair, Corruption, Metrics, SuperclassMetrics
from training.metrics_log import MetricsEntry, append_metrics
from training.model import Perceiver
from training.network import count_parameters
from training.preprocessing import Preprocess
from training.report_schema import CURVES, PLOTS, Report

LABELS = ("apple", "bear", "cup", "door")
SIZE = 8
TINY = ModelConfig(
    num_classes=len(LABELS),
    input_size=SIZE,
    image_size=SIZE,
    patch_size=2,
    patch_overlap=1,
    dim=16,
    token_dim=12,
    num_latents=4,
    num_blocks=1,
    cross_heads=2,
    cross_head_dim=8,
    self_heads=2,
    self_head_dim=8,
    ffn_ratio=2,
)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def perturb(model: nn.Module) -> None:
    """Give every parameter a value that matters: fresh biases and scales are zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def write_images(folder: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in LABELS:
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


def superclass(name: str, n: int, top1: float) -> SuperclassMetrics:
    return SuperclassMetrics(name=name, n=n, top1=top1, top5=0.9, superclass_top1=top1 + 0.3)


def confidence(pictures: str, n: int, mean: float) -> Confidence:
    return Confidence(pictures=pictures, n=n, mean=mean, above_half=mean / 2, top1=None)


def epoch_line(epoch: int) -> MetricsEntry:
    figures = {"train_loss": 4.0 / epoch, "val_loss": 3.0 / epoch, "val_top1": 0.1 * epoch, "val_top5": 0.2 * epoch}
    return {"epoch": epoch, **figures, "seconds": 300.0, "device": "cpu", "processes": 2, "threads": 1}


def write_run(folder: Path, data: Path | None, model_config: ModelConfig = TINY, temperature: float = 1.25) -> Path:
    """Write a run's folder: best checkpoint, report, metrics, plots."""
    folder.mkdir()
    torch.manual_seed(0)
    model = Perceiver(model_config)
    perturb(model)
    preprocess = Preprocess(model_config.image_size, mean=(120.0, 125.0, 110.0), variance=(4000.0, 4100.0, 3900.0))
    run = RunConfig(
        preset="compact",
        data=str(data) if data else None,
        dataset="things",
        labels=LABELS,
        model=model_config,
        train=TrainConfig(epochs=7, mixup=0.5),
    )
    (folder / "config.json").write_text(run.model_dump_json())
    val = Metrics(split="val", n=20, top1=0.5, top5=1.0, loss=1.0, ece=0.1)
    tensors = checkpoint.add_prefix("model", model.state_dict())
    tensors |= checkpoint.add_prefix("preprocess", preprocess.state_dict())
    header = checkpoint.make_header(run, 2, 10, val, {})
    checkpoint.save(folder / "best.safetensors", tensors, header)
    test = val.model_copy(update={"split": "test", "n": 30, "top1": 0.4321})
    report = Report(
        preset="compact",
        dataset="things",
        parameters=count_parameters(model),
        training_pictures=40,
        epoch=2,
        temperature=temperature,
        checkpoint_sha256=checkpoint.digest(folder / "best.safetensors"),
        note="a note",
        val=val,
        val_uncalibrated=val,
        test=test,
        test_uncalibrated=test.model_copy(update={"ece": 0.2}),
        most_confused=(ConfusedPair("bear", "cup", 3, 0.25),),
        test_readings=1,
        lineage_test_readings=1,
        distinct=test.model_copy(update={"n": 26, "top1": 0.4211}),
        corruptions=(Corruption(name="none", n=20, top1=0.45), Corruption(name="greyscale", n=20, top1=0.4)),
        superclasses=(superclass("poor", 10, 0.2), superclass("good", 20, 0.5)),
        confidence=(confidence("test pictures", 30, 0.6), confidence("noise", 10, 0.3), confidence("text", 30, 0.7)),
    )
    (folder / "report.json").write_text(report.model_dump_json())
    for epoch in (1, 2, 3):
        append_metrics(folder, epoch_line(epoch))
    for name in (CURVES, *PLOTS):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture(scope="session")
def graphs() -> dict[tuple[str, tuple[int, int], bytes], ModelProto]:
    """What torch has translated, by the modules, the input size, and what they give for noise."""
    return {}


@pytest.fixture(scope="module")
def translated_once(graphs: dict[tuple[str, tuple[int, int], bytes], ModelProto]) -> Iterator[None]:
    """Have torch translate equal models once: seconds each, in tests of what comes before and after it."""

    def to_onnx_once(model: nn.Module, input_size: tuple[int, int]) -> ModelProto:
        noise = np.random.default_rng(0).integers(0, 256, (3, *input_size, 3), dtype=np.uint8)
        with torch.no_grad():
            given = b"".join(values.numpy().tobytes() for values in model(torch.from_numpy(noise)))
        key = (repr(model), input_size, given)
        if key not in graphs:
            graphs[key] = to_onnx(model, input_size)
        graph = ModelProto()
        graph.CopyFrom(graphs[key])
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "to_onnx", to_onnx_once)
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", image_folder)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run's folder that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))
