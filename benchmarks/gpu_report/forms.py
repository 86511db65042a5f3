"""The forms in which a model runs: onnxruntime without and with bound buffers and graphs, torch eager and compiled.

Shape letters: N images of a batch, H and W the input size in pixels, C classes.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import ModelPlace
from service.engine.metadata import MODEL_FILE, MODEL_FILES, to_props
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import HostRunner, Images, Logits
from service.engine.session import EngineError, Provider, SessionSpec, metadata_of, open_session, read_metadata
from service.repository.folder import CHECKPOINT_FILE, GOLDEN_FILE, load_golden
from service.repository.golden_check import replay_golden

if TYPE_CHECKING:
    from torch import nn

PLAIN, BOUND, GRAPHS = "plain", "io-bound", "CUDA graphs"
ENGINE_FORMS = (PLAIN, BOUND, GRAPHS)
TOLERANCE_FACTOR = 2.0  # as export/quantization has it


class PlainEngine:
    """onnxruntime as most programs call it: `session.run` on NumPy arrays. Attributes as of `Engine`."""

    def __init__(self, path: Path, provider: Provider, max_batch_size: int) -> None:
        session: Any = open_session(path, SessionSpec(provider=provider, max_batch_size=max_batch_size))
        self.metadata = metadata_of(session, path)
        self.max_batch_size = max_batch_size
        self._runner: HostRunner | None = HostRunner(session, max_batch_size)

    def run(self, images: Images) -> Logits:
        """Classify uint8 [N, H, W, 3]; return float32 [N, C]."""
        assert self._runner is not None
        return self._runner.run(images)

    def close(self) -> None:
        """Free the memory."""
        self._runner = None


class TorchEngine:
    """A torch module from host memory to host memory. Attributes as of `Engine`.

    Args:
        model: uint8 [N, H, W, 3] to logits [N, C]; it is moved to `device`.
        input_size: H and W.
        device: "cpu" or "cuda".
        half: whether matrix products run in float16, by torch's autocast.
        max_batch_size: largest N.
    """

    def __init__(
        self, model: "nn.Module", input_size: tuple[int, int], device: str, *, half: bool, max_batch_size: int
    ) -> None:
        import torch

        self.metadata = SimpleNamespace(input_size=input_size)
        self.max_batch_size = max_batch_size
        self._torch, self._half = torch, half
        self._device = torch.device(device)
        self._model = model.to(self._device)

    def run(self, images: Images) -> Logits:
        """Classify uint8 [N, H, W, 3]; return float32 [N, C]."""
        torch = self._torch
        with torch.inference_mode(), torch.autocast(self._device.type, torch.float16, enabled=self._half):
            logits = self._model(torch.from_numpy(images).to(self._device))
        result: Logits = logits.float().cpu().numpy()
        return result

    def close(self) -> None:
        """Leave the memory to torch."""


def open_form(form: str, path: Path, provider: Provider, batches: Sequence[int]) -> PlainEngine | OnnxEngine:
    """Open a model file in one of `ENGINE_FORMS`, warm where the form is made for a GPU.

    Raises:
        EngineError: the form wants a GPU and the provider is the CPU, graphs can't be had, or the file can't be opened.
    """
    if form == PLAIN:
        return PlainEngine(path, provider, max(batches))
    engine = OnnxEngine(
        path, provider=provider, max_batch_size=max(batches), buckets=batches, cuda_graphs=form == GRAPHS
    )
    engine.warm_up()
    if form == GRAPHS and engine.without_graphs is not None:  # it would be measured under a name that is not its own
        engine.close()
        raise EngineError(f"no CUDA graphs: {engine.without_graphs}")
    return engine


def add_float16(place: ModelPlace, provider: Provider) -> None:
    """Write the float16 file beside `model.onnx` where there is none; its tolerance is twice its difference here.

    Raises:
        EngineError: the file does not run on this provider.
    """
    path = place.path / MODEL_FILES["float16"]
    if path.is_file():
        return
    import onnx

    from export.quantization.float16 import to_float16

    half = to_float16(onnx.load(place.path / MODEL_FILE))
    metadata = read_metadata(place.path / MODEL_FILE).model_copy(update={"precision": "float16"})
    onnx.helper.set_model_props(half, to_props(metadata))
    draft = path.with_suffix(".draft")
    onnx.save(half, draft)
    with closing(OnnxEngine(draft, provider=provider, max_batch_size=4, cuda_graphs=False)) as engine:
        difference = replay_golden(engine, load_golden(place.path / GOLDEN_FILE)).max_abs_difference
    draft.unlink()
    tolerance = max(metadata.golden_tolerance, TOLERANCE_FACTOR * difference)
    onnx.helper.set_model_props(half, to_props(metadata.model_copy(update={"golden_tolerance": tolerance})))
    onnx.save(half, path)


def trained_form(place: ModelPlace, preset: str | None) -> tuple["nn.Module", tuple[int, int]]:
    """Return torch's form of a model, from its checkpoint or with the weights of a preset, and its input size.

    Raises:
        FileNotFoundError: a folder without a checkpoint.
        CheckpointError: a damaged one.
    """
    checkpoint = place.path / CHECKPOINT_FILE
    if preset is None and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: there is none, so torch has nothing to run")
    from export.graph.trained import TrainedModel
    from export.source import random_source
    from training.checkpoint import load_model

    if preset is not None:
        source = random_source(preset)
        model, preprocess, size = source.model, source.preprocess, source.run.model.input_size
    else:
        model, preprocess, header = load_model(checkpoint)
        size = header.run.model.input_size
    return TrainedModel(preprocess, model).eval(), (size, size)


def random_images(count: int, input_size: tuple[int, int]) -> Images:
    """Return uint8 [count, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, *input_size, 3), dtype=np.uint8)
