"""Variants: gates that let pass and that refuse, what is written, and the gates run again."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import verify
from export.__main__ import main
from export.quantization import gate, sensitivity
from export.quantization.gate import describe, measure_speedup, refusal
from export.source import load_data, load_source
from service.engine.metadata import VariantGate
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import EngineError, read_metadata
from tests.export.conftest import SIZE
from tests.fakes import FakeEngine

pytestmark = pytest.mark.usefixtures("translated_once")
GATE = VariantGate(
    provider="cpu", split="val", n=5000, labels_equal=0.995, top1=0.59, top1_float32=0.593, speed=((1, 1.01), (8, 1.2))
)
FAST = ((1, 1.1), (4, 1.5))


@pytest.fixture(autouse=True)
def few_images_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MIN_IMAGES", 20)


def changed(**changes: object) -> VariantGate:
    return GATE.model_copy(update=changes)


def test_a_gate_lets_pass_at_its_bounds() -> None:
    assert refusal(GATE) is None
    assert refusal(changed(top1=0.7)) is None
    assert refusal(changed(speed=None)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels_equal": 0.9948}, "only 99.48% of 5,000 labels"),
        ({"top1": 0.5899}, "top-1 falls from 59.30% to 58.99%, 0.3 points are allowed"),
        ({"speed": ((1, 1.3), (8, 0.97))}, "not faster than float32: 0.97 at batch 8"),
        ({"speed": ((1, 1.0),)}, "not faster"),
        ({"n": 19}, "19 val images are too few to measure how many labels differ; at least 20 are needed"),
    ],
)
def test_a_gate_says_what_it_refuses(changes: dict[str, object], words: str) -> None:
    assert words in (refusal(changed(**changes)) or "")


def test_a_gate_in_a_sentence() -> None:
    assert "99.50% of 5,000 labels equal" in describe(GATE)
    assert "1.01 at batch 1, 1.20 at batch 8" in describe(GATE)
    assert "speed not measured" in describe(changed(speed=None))


def test_speed_is_that_of_the_fastest_runs_in_turn() -> None:
    slow, fast = FakeEngine(), FakeEngine()
    slow.delay, fast.delay = 0.02, 0.002
    ((batch, ratio),) = measure_speedup(slow, fast, [2], seconds=0.05)
    assert batch == 2
    assert 2 < ratio < 20
    assert {len(images) for images in slow.batches} == {2}
    assert len(slow.batches) == len(fast.batches) >= 3


def export(run: Path, out: Path, *arguments: str) -> int:
    return main([str(run), "--out", str(out), "--golden", "6", "--max-batch", "5", *arguments])


@pytest.fixture(scope="module")
def version(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version with int8 and an unmeasured float16; labels flip easily on 20 images of noise."""
    out = tmp_path_factory.mktemp("models") / "things"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "FLIP_RATES", (0.05, 0.01))
        patch.setattr(gate, "MIN_IMAGES", 20)
        patch.setattr(gate, "MIN_LABELS_EQUAL", 0.8)
        patch.setattr(gate, "MAX_TOP1_LOSS", 1.0)
        patch.setattr(gate, "measure_speedup", lambda base, variant, batches: FAST)
        assert export(run, out, "--variants", "int8", "float16", "--untimed") == 0
    return out / "1"


def test_variants_lie_beside_the_float32_file_with_their_gates(version: Path) -> None:
    int8, float16 = (read_metadata(version / name) for name in ("model.int8.onnx", "model.fp16.onnx"))
    assert read_metadata(version / "model.onnx").gate is None
    assert (int8.precision, float16.precision) == ("int8", "float16")
    assert int8.gate is not None
    assert (int8.gate.provider, int8.gate.split, int8.gate.n, int8.gate.speed) == ("cpu", "val", 20, FAST)
    assert float16.gate is not None
    assert float16.gate.speed is None
    gates = json.loads((version / "metrics.json").read_text())["variants"]
    assert gates["int8"]["labels_equal"] == int8.gate.labels_equal


def test_the_card_describes_them(version: Path) -> None:
    card = " ".join((version / "README.md").read_text().split())
    assert "`model.int8.onnx`, int8:" in card
    assert "1.10 at batch 1, 1.50 at batch 4" in card
    assert "speed not measured" in card


def test_the_int8_file_computes_on_integers(version: Path) -> None:
    kinds = {node.op_type for node in onnx.load(version / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "MatMulIntegerToFloat"} <= kinds


def test_the_float16_file_casts_around_what_needs_float32_alone(version: Path) -> None:
    model = onnx.load(version / "model.fp16.onnx")
    onnx.checker.check_model(model)
    halves = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    casts = {name for node in model.graph.node if node.op_type == "Cast" for name in (*node.input, *node.output)}
    kinds = set()
    for node in model.graph.node:
        kinds.add(node.op_type)
        if node.op_type in ("Gemm", "LayerNormalization"):
            assert set(node.input) & halves
        if node.op_type in ("LayerNormalization", "Softmax", "Gelu"):
            assert not casts & {*node.input, *node.output}
        if node.op_type in ("Conv", "ReduceMean"):
            assert not halves & {*node.input}
            assert casts & {*node.output}
    assert {"Gemm", "LayerNormalization", "Softmax", "ReduceMean"} <= kinds
    assert [model.graph.input[0].type.tensor_type.elem_type, model.graph.output[0].type.tensor_type.elem_type] == [
        onnx.TensorProto.UINT8,
        onnx.TensorProto.FLOAT,
    ]


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.fp16.onnx"])
def test_variants_answer_like_the_float32_file(version: Path, name: str) -> None:
    images = np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    expected, found = (
        OnnxEngine(version / file, provider="cpu", max_batch_size=5).run(images) for file in ("model.onnx", name)
    )
    assert np.sqrt(np.square(found - expected).mean()) < 0.1 * expected.std()


def test_verify_runs_all_gates_again(
    version: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(image_folder.parent)  # of the path of its data a version has the last part
    monkeypatch.setattr(gate, "MIN_LABELS_EQUAL", 0.8)
    monkeypatch.setattr(gate, "MAX_TOP1_LOSS", 1.0)
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: FAST)
    assert main(["--verify", str(version), "--provider", "cpu", "--max-batch", "3"]) == 0
    out = capsys.readouterr().out
    assert "1.50 at batch 4" in out
    assert out.count("of 20 labels equal") == 2
    assert "its speed was not measured: this file is for cuda" in out
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: ((1, 0.9),))
    assert main(["--verify", str(version), "--provider", "cpu", "--max-batch", "3"]) == 1
    assert "model.int8.onnx: it is not faster" in capsys.readouterr().err


def test_verify_says_what_it_could_not_run(
    version: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(image_folder.parent)
    arguments = ["--verify", str(tmp_path / "1"), "--provider", "cpu", "--max-batch", "2"]
    shutil.copytree(version, tmp_path / "1")
    assert main([*arguments, "--data", str(tmp_path / "gone")]) == 2
    assert "gone: does not exist" in capsys.readouterr().err
    monkeypatch.setattr(verify, "has_changed", lambda source, data: True)
    assert main(arguments) == 0
    assert "labels were not compared: the data set has other images" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(image_folder.parent)
    monkeypatch.setattr(verify, "load_data", lambda source, data: load_data(source, tmp_path / "gone"))
    assert main(arguments) == 0
    assert "labels were not compared" in capsys.readouterr().out
    (tmp_path / "1" / "checkpoint.safetensors").unlink()
    assert main(arguments) == 0
    assert "nothing but the golden images was compared with torch" in capsys.readouterr().out


def test_a_version_folder_can_be_exported_again(version: Path, run: Path) -> None:
    first, again = load_source(run), load_source(version)
    assert again.checkpoint_sha256 == first.checkpoint_sha256
    assert (again.temperature, again.metrics) == (first.temperature, first.metrics)


@pytest.mark.parametrize(
    ("target", "speed", "words"),
    [((0.05,), ((1, 0.5),), "refused: it is not faster"), ((-1.0,), FAST, "no candidate passed")],
)
def test_what_does_not_pass_is_not_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: tuple[float, ...],
    speed: tuple[tuple[int, float], ...],
    words: str,
) -> None:
    monkeypatch.setattr(sensitivity, "FLIP_RATES", target)
    monkeypatch.setattr(gate, "MIN_LABELS_EQUAL", 0.5)
    monkeypatch.setattr(gate, "MAX_TOP1_LOSS", 1.0)
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: speed)
    assert export(run, tmp_path / "out", "--variants", "int8") == 0
    assert words in capsys.readouterr().out
    assert not (tmp_path / "out" / "1" / "model.int8.onnx").exists()


def test_a_variant_that_can_not_be_timed_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("service.engine.session.why_no_cuda", lambda device_id=0: "there is none")
    assert export(run, tmp_path / "out", "--variants", "float16") == 0
    assert "model.fp16.onnx: not written, since its speed can't be measured here" in capsys.readouterr().out
    assert not (tmp_path / "out" / "1" / "model.fp16.onnx").exists()


def test_a_variant_that_is_not_tried_gives_a_warning(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("service.engine.session.why_no_cuda", lambda device_id=0: "there is none")
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: FAST)
    assert export(run, tmp_path / "out") == 0
    assert "warning: model.fp16.onnx is not tried: its speed is measured on CUDA" in capsys.readouterr().out
    assert export(run, tmp_path / "none", "--variants") == 0
    assert "is not tried" not in capsys.readouterr().out


def test_untimed_variants_need_not_be_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("service.engine.session.why_no_cuda", lambda device_id=0: "there is none")
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: FAST)
    assert export(run, tmp_path / "out", "--untimed") == 0
    told = capsys.readouterr().out
    assert "is not tried" not in told
    assert "model.fp16.onnx: half precision except for the pixels and the last mean" in told


def test_a_variant_that_does_not_run_is_refused_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(base: object, variant: object, batches: object) -> None:
        raise EngineError("model.onnx: a batch of 8 failed: CUDA error 700")

    monkeypatch.setattr(gate, "measure_speedup", fails)
    assert export(run, tmp_path / "out", "--variants", "int8") == 0
    told = capsys.readouterr().out
    assert "refused: model.onnx: a batch of 8 failed: CUDA error 700." in told
    assert "model.int8.onnx: not written, since no candidate passed." in told
    assert (tmp_path / "out" / "1" / "model.onnx").exists()
    assert not (tmp_path / "out" / "1" / "model.int8.onnx").exists()


def test_an_engine_is_warm_before_it_is_judged(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where graphs can't be captured only the warm-up finds out, and goes on without."""
    warm: list[OnnxEngine] = []
    warm_up, classify = OnnxEngine.warm_up, OnnxEngine.run

    def warmed(engine: OnnxEngine) -> None:
        warm_up(engine)
        warm.append(engine)

    def guarded(engine: OnnxEngine, images: np.ndarray) -> np.ndarray:
        assert engine in warm
        return classify(engine, images)

    monkeypatch.setattr(OnnxEngine, "warm_up", warmed)
    monkeypatch.setattr(OnnxEngine, "run", guarded)
    monkeypatch.setattr(gate, "MIN_LABELS_EQUAL", 0.0)
    monkeypatch.setattr(gate, "MAX_TOP1_LOSS", 1.0)
    monkeypatch.setattr(gate, "measure_speedup", lambda base, variant, batches: FAST)
    assert export(run, tmp_path / "out", "--variants", "int8") == 0
    assert main(["--verify", str(tmp_path / "out"), "--data", str(image_folder)]) == 0
    files = [engine.path.name for engine in warm]
    assert files.count("model.onnx") >= 4  # twice alone, twice beside the variant
    assert files.count("model.int8.onnx") >= 2
