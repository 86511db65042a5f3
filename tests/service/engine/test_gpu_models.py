"""The models of the GPU's tests answer as they must, on the CPU."""

from pathlib import Path

import numpy as np

from service.engine.metadata import MODEL_FILES
from service.engine.onnx_engine import OnnxEngine
from service.repository.folder import GOLDEN_FILE, load_golden
from service.repository.golden_check import check_golden
from tests.fakes import tiny_images, tiny_logits
from tests.service.gpu_models import make_half_folder, make_hungry_folder


def test_the_float16_file(tmp_path: Path) -> None:
    version = make_half_folder(tmp_path)
    engine = OnnxEngine(version / MODEL_FILES["float16"], provider="cpu", intra_op_threads=1)
    assert engine.metadata.precision == "float16"
    report = check_golden(engine, load_golden(version / GOLDEN_FILE))
    assert report.max_abs_difference > 1e-5  # it is not the float32 file


def test_the_hungry_model(tmp_path: Path) -> None:
    version = make_hungry_folder(tmp_path, 1 << 20)
    engine = OnnxEngine(version / "model.onnx", provider="cpu", intra_op_threads=1)
    images = tiny_images(5)
    np.testing.assert_allclose(engine.run(images), tiny_logits(images, 1), atol=1e-4)
