import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.engine import onnx_engine as engine_module
from service.engine.metadata import MODEL_FILES, ArtifactError
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import HostRunner
from service.engine.session import EngineError, choose_file, read_metadata
from tests.fakes import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Defect,
    Images,
    Logits,
    make_model_folder,
    tiny_images,
    tiny_logits,
    tiny_metadata,
)
from tests.service.gpu_models import make_hungry_folder
from tests.service.tiny_engines import LimitedSession, limited_engine, open_tiny

TOLERANCE = 1e-4


def test_it_computes_the_graph(folder: Path) -> None:
    engine = open_tiny(folder)
    for n in range(1, engine.max_batch_size + 1):
        images = tiny_images(n, seed=n)
        logits = engine.run(images)
        assert (logits.dtype, logits.shape) == (np.float32, (n, CLASSES))
        np.testing.assert_allclose(logits, tiny_logits(images, 1), atol=TOLERANCE)


def test_it_has_its_provider_and_metadata(folder: Path) -> None:
    engine = open_tiny(folder)
    assert (engine.provider, engine.metadata, engine.max_batch_size) == ("cpu", tiny_metadata(), 8)
    assert read_metadata(folder / "model.onnx") == tiny_metadata()


def test_a_run_repeats_bit_for_bit_and_black_and_white_are_no_exception(folder: Path) -> None:
    engine = open_tiny(folder)
    for images in (
        tiny_images(5),
        np.zeros((3, HEIGHT, WIDTH, 3), np.uint8),
        np.full((2, HEIGHT, WIDTH, 3), 255, np.uint8),
    ):
        np.testing.assert_array_equal(engine.run(images), engine.run(images))
        np.testing.assert_allclose(engine.run(images), tiny_logits(images, 1), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("corrupt_onnx", "can't load this file"),
        ("empty_onnx", "can't load this file"),
        ("missing_onnx", "no such file"),
        ("float_input", r"must be images tensor\(uint8\).* is images tensor\(float\)"),
        ("input_name", "must be images .* is pixels"),
        ("output_name", "must be logits .* is scores"),
        ("two_outputs", "only output must be logits"),
        ("fixed_batch", "of any batch"),
        ("too_few_labels", r"\['batch', 2\] of any batch, and is .*\['batch', 5\]"),
        ("other_size", "of any batch"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(defect: Defect, words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=words) as refused:
        open_tiny(make_model_folder(tmp_path, defect=defect))
    assert str(tmp_path / "1" / "model.onnx") in str(refused.value)


@pytest.mark.parametrize("defect", ["no_metadata", "broken_metadata"])
def test_metadata_that_break_the_contract_are_refused(defect: Defect, tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, defect=defect) / "model.onnx"
    for read in (lambda: OnnxEngine(path, provider="cpu"), lambda: read_metadata(path)):
        with pytest.raises(ArtifactError, match=r"model\.onnx: metadata: "):
            read()


def test_reading_metadata_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="can't read this file"):
        read_metadata(make_model_folder(tmp_path, defect="corrupt_onnx") / "model.onnx")


@pytest.mark.parametrize(
    "images",
    [
        tiny_images(0),
        tiny_images(9),
        tiny_images(2).astype(np.float32),
        tiny_images(2)[:, :2],
        tiny_images(2)[..., :1],
        tiny_images(1)[0],
    ],
)
def test_a_batch_of_another_form_is_refused(folder: Path, images: Images) -> None:
    with pytest.raises(EngineError, match=r"must be uint8 \[1..8, 4, 6, 3\], and is "):
        open_tiny(folder).run(images)


def test_a_closed_engine_refuses(folder: Path) -> None:
    engine = open_tiny(folder)
    engine.close()
    engine.close()
    for use in (lambda: engine.run(tiny_images(1)), engine.warm_up):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_a_batch_size_below_one_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="at least 1, and is 0"):
        open_tiny(folder, max_batch_size=0)


# Memory


def test_a_batch_without_memory_is_run_in_halves_and_the_ceiling_falls(folder: Path) -> None:
    engine, session = limited_engine(folder, limit=4)
    images = tiny_images(7)
    np.testing.assert_array_equal(engine.run(images), tiny_logits(images, 1))
    assert session.sizes == [7, 4, 3]
    assert engine.max_batch_size == 4
    with pytest.raises(EngineError, match=r"\[1\.\.4"):
        engine.run(images)


def test_halves_are_tried_once(folder: Path) -> None:
    engine, session = limited_engine(folder, limit=1)
    with pytest.raises(EngineError, match="no memory for 8, nor for 4"):
        engine.run(tiny_images(8))
    assert session.sizes == [8, 4]
    assert engine.max_batch_size == 4
    engine.run(tiny_images(2))  # the next batch finds its own size
    assert engine.max_batch_size == 1


def test_a_single_image_without_memory_fails(folder: Path) -> None:
    engine, session = limited_engine(folder, limit=0)
    with pytest.raises(EngineError, match="not enough memory for a single image"):
        engine.run(tiny_images(1))
    assert session.sizes == [1]


def test_warm_up_finds_the_batch_size_that_fits(folder: Path) -> None:
    engine, session = limited_engine(folder, limit=5)
    engine.warm_up()
    assert session.sizes == [8, 4, 1]
    assert engine.max_batch_size == 4
    engine, session = limited_engine(folder, limit=0)
    with pytest.raises(EngineError, match="not enough memory for a single image"):
        engine.warm_up()
    assert session.sizes == [8, 4, 2, 1]


ARENA = """
import numpy as np, onnxruntime as ort, sys
from service.engine.runners import is_out_of_memory
info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": 2**26, "arena_extend_strategy": 1}))
options = ort.SessionOptions()
options.log_severity_level = 4
options.add_session_config_entry("session.use_env_allocators", "1")
session = ort.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
try:
    session.run(None, {"images": np.zeros((64, *map(int, sys.argv[2:]), 3), np.uint8)})
except Exception as error:
    sys.exit(0 if is_out_of_memory(error) else f"not taken for want of memory: {error}")
sys.exit("there was enough memory")
"""


def test_onnxruntimes_out_of_memory_errors_are_recognised(tmp_path: Path) -> None:
    """In a process of its own, since an arena's limit is the process's; it is the same arena as on a GPU."""
    model = make_hungry_folder(tmp_path, 24 * 2**20) / "model.onnx"
    command = [sys.executable, "-c", ARENA, str(model), str(HEIGHT), str(WIDTH)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_any_other_failure_is_no_reason_to_try_again(folder: Path) -> None:
    class BrokenSession(LimitedSession):
        def run(self, outputs: Sequence[str], feeds: dict[str, Images], options: object = None) -> list[Logits]:
            super().run(outputs, feeds)
            raise RuntimeError("CUDA error 700: an illegal memory access was encountered")

    engine, session = open_tiny(folder), BrokenSession(limit=100)
    engine._runner = HostRunner(session, 8)
    with pytest.raises(EngineError, match="a batch of 8 failed: CUDA error 700"):
        engine.run(tiny_images(8))
    with pytest.raises(EngineError, match="a batch of 8 failed: CUDA error 700"):
        engine.warm_up()
    assert session.sizes == [8, 8]
    assert engine.max_batch_size == 8


# Files


@pytest.mark.parametrize(
    ("files", "provider", "precision", "chosen"),
    [
        (["float32"], "cpu", "auto", "float32"),
        (["float32"], "cuda", "auto", "float32"),
        (["float32", "float16", "int8"], "cpu", "auto", "int8"),
        (["float32", "float16", "int8"], "cuda", "auto", "float16"),
        (["float32", "float16", "int8"], "tensorrt", "auto", "float16"),
        (["float32", "float16", "int8"], "cuda", "float32", "float32"),
        (["float32", "int8"], "cuda", "int8", "int8"),
    ],
)
def test_the_file_that_fits_the_provider_is_chosen(
    files: list[str], provider: str, precision: str, chosen: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / MODEL_FILES[name]).touch()
    assert choose_file(tmp_path, provider, precision) == tmp_path / MODEL_FILES[chosen]


def test_a_precision_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(EngineError, match=r"no model\.fp16\.onnx, which precision float16 on cpu needs"):
        choose_file(tmp_path, "cpu", "float16")


def test_the_engine_needs_no_web_framework_and_no_torch() -> None:
    script = f"import sys, {engine_module.__name__}; print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "onnxruntime" in modules
    assert {"fastapi", "starlette", "prometheus_client", "uvicorn", "torch", "onnx", "PIL"}.isdisjoint(modules)
