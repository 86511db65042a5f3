import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.engine.metadata import (
    MODEL_FILE,
    MODEL_FILES,
    ArtifactError,
    EvalMetrics,
    ModelMetadata,
    ResizePolicy,
    VariantGate,
    from_props,
    to_props,
)
from service.repository.folder import GOLDEN_FILE, Golden, list_versions, load_golden, save_golden
from tests.fakes import CLASSES, HEIGHT, WIDTH, tiny_images, tiny_metadata

METRICS = EvalMetrics(split="test", n=10_000, top1=0.5264, top5=0.8087, loss=1.863, ece=0.02)


def golden(n: int = 3) -> Golden:
    return Golden(tiny_images(n), np.arange(n), np.random.default_rng(0).normal(size=(n, CLASSES)).astype(np.float32))


def test_metadata_survives_the_way_through_props() -> None:
    metadata = tiny_metadata(metrics=METRICS, temperature=1.5, resize=ResizePolicy(crop="none", filter="box"))
    assert from_props(to_props(metadata)) == metadata


@given(
    labels=st.lists(st.text(min_size=1), min_size=2, max_size=20, unique=True),
    input_size=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    tolerance=st.floats(min_value=1e-9, max_value=10),
    name=st.text(min_size=1),
    top1=st.none() | st.floats(0, 1),
)
def test_any_valid_metadata_survives(
    labels: list[str], input_size: tuple[int, int], tolerance: float, name: str, top1: float | None
) -> None:
    metrics = None if top1 is None else METRICS.model_copy(update={"top1": top1})
    metadata = tiny_metadata(
        labels=tuple(labels), input_size=input_size, golden_tolerance=tolerance, name=name, metrics=metrics
    )
    assert from_props(to_props(metadata)) == metadata


def test_props_are_json_under_one_prefix_with_the_keys_of_the_onnx_specification() -> None:
    props = to_props(tiny_metadata())
    own = {key.removeprefix("perceiver."): value for key, value in props.items() if key.startswith("perceiver.")}
    assert set(own) == set(ModelMetadata.model_fields) - {"feature_dim", "unfamiliarity", "gate"}  # of some files
    assert json.loads(own["labels"]) == [f"class {index}" for index in range(CLASSES)]
    assert json.loads(own["input_size"]) == [HEIGHT, WIDTH]
    assert {key: value for key, value in props.items() if not key.startswith("perceiver.")} == {
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "NominalRange_0_255",
    }


def test_keys_of_other_tools_are_ignored() -> None:
    props = to_props(tiny_metadata()) | {"producer": "someone", "onnx.infer": "not json"}
    assert from_props(props) == tiny_metadata()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema_version", "2", "schema_version"),
        ("labels", '["cat"]', "labels"),
        ("labels", '["cat", "cat"]', "unique; repeated: cat"),
        ("labels", '["cat", ""]', "labels.1"),
        ("labels", "__import__('os').system('true')", "perceiver.labels must be JSON"),
        ("input_size", "[32]", "input_size"),
        ("input_size", "[32, 0]", "input_size.1"),
        ("parameters", '"12"', "parameters"),  # a string is no number
        ("precision", '"float64"', "precision"),
        ("golden_tolerance", "NaN", "golden_tolerance"),
        ("golden_tolerance", "0", "golden_tolerance"),
        ("temperature", "-1", "temperature"),
        ("resize", '{"crop": "left", "filter": "bicubic"}', "resize.crop"),
        ("resize", '{"crop": "center", "filter": "bicubic", "gamma": 1}', "resize.gamma"),
        ("metrics", '{"split": "test", "n": 1, "top1": 52.64, "top5": 1, "loss": 1, "ece": 0}', "metrics.top1"),
        (
            "provenance",
            '{"git_commit": null, "checkpoint_sha256": "", "created": "yesterday", "versions": {}}',
            "created",
        ),
        ("colour", '"red"', "colour: Extra inputs are not permitted"),
    ],
)
def test_broken_metadata_is_refused_with_the_field_that_is_wrong(key: str, value: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words.replace("[", r"\[").replace(".", r"\.")):
        from_props(to_props(tiny_metadata()) | {f"perceiver.{key}": value})


@pytest.mark.parametrize("field", [name for name, field in ModelMetadata.model_fields.items() if field.is_required()])
def test_each_required_field_is_missed(field: str) -> None:
    props = to_props(tiny_metadata())
    del props[f"perceiver.{field}"]
    with pytest.raises(ArtifactError, match=f"{field}: Field required"):
        from_props(props)


def test_a_file_of_another_tool_is_named_as_such() -> None:
    with pytest.raises(ArtifactError, match="there is no perceiver"):
        from_props({"producer": "someone"})


def test_metadata_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny_metadata().name = "other"  # type: ignore[misc]


def test_the_float32_file_is_the_one_that_other_servers_read() -> None:
    assert MODEL_FILES["float32"] == MODEL_FILE == "model.onnx"


def test_golden_images_survive(tmp_path: Path) -> None:
    written = golden()
    save_golden(tmp_path / GOLDEN_FILE, written)
    read = load_golden(tmp_path / GOLDEN_FILE)
    for name in ("images", "labels", "logits"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name), strict=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": tiny_images(3).astype(np.float32)}, "images must be uint8"),
        ({"images": tiny_images(3)[0]}, "images must be uint8 with 4 dimensions"),
        ({"images": tiny_images(3)[..., :1]}, "3 channels"),
        ({"labels": np.arange(3, dtype=np.int32)}, "labels must be int64"),
        ({"logits": np.zeros((3, CLASSES))}, "logits must be float32"),
        ({"logits": np.full((3, CLASSES), np.nan, dtype=np.float32)}, "finite"),
        ({"images": tiny_images(2)}, "are 2, 3 and 3"),
        (
            {
                "images": tiny_images(0),
                "labels": np.zeros(0, dtype=np.int64),
                "logits": np.zeros((0, CLASSES), dtype=np.float32),
            },
            "at least one",
        ),
    ],
)
def test_wrong_golden_arrays_are_refused(changes: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    arrays = {name: getattr(golden(), name) for name in ("images", "labels", "logits")} | changes
    with pytest.raises(ArtifactError, match=words):
        Golden(**arrays)
    np.savez(tmp_path / GOLDEN_FILE, **arrays)
    with pytest.raises(ArtifactError, match=f"{GOLDEN_FILE}: golden images: .*{words}"):
        load_golden(tmp_path / GOLDEN_FILE)


class Boom:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return pytest.fail, ("a pickle was run",)


def test_a_pickle_in_the_golden_file_is_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / GOLDEN_FILE, images=np.array([Boom()]), labels=golden().labels, logits=golden().logits)
    with pytest.raises(ArtifactError, match="allow_pickle=False"):
        load_golden(tmp_path / GOLDEN_FILE)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"\x93NUMPY"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / GOLDEN_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="npz archive"):
        load_golden(tmp_path / GOLDEN_FILE)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    save_golden(tmp_path / GOLDEN_FILE, golden())
    content = (tmp_path / GOLDEN_FILE).read_bytes()
    for length in range(0, len(content), 97):
        (tmp_path / GOLDEN_FILE).write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="npz archive"):
            load_golden(tmp_path / GOLDEN_FILE)


@given(st.integers(0, 1400), st.binary(min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(tmp_path: Path, at: int, damage: bytes) -> None:
    save_golden(tmp_path / GOLDEN_FILE, golden())
    content = bytearray((tmp_path / GOLDEN_FILE).read_bytes())
    content[at : at + len(damage)] = damage
    (tmp_path / GOLDEN_FILE).write_bytes(content)
    with suppress(ArtifactError):
        load_golden(tmp_path / GOLDEN_FILE)


def test_a_missing_array_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        load_golden(tmp_path / GOLDEN_FILE)
    np.savez(tmp_path / GOLDEN_FILE, images=golden().images, labels=golden().labels)
    with pytest.raises(ArtifactError, match="logits"):
        load_golden(tmp_path / GOLDEN_FILE)


def test_versions_are_plain_positive_integers_in_numeric_order(tmp_path: Path) -> None:
    for name in ("10", "9", "1", "0", "02", "-3", "1.5", ".4-writing", "latest", "٣", "²", "1" * 19):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    assert [version.number for version in list_versions(tmp_path)] == [1, 9, 10]
    assert list_versions(tmp_path)[-1].path == tmp_path / "10"
    assert list_versions(tmp_path / "nowhere") == []


GATE = VariantGate(
    provider="cpu", split="val", n=5000, labels_equal=0.996, top1=0.59, top1_float32=0.592, speed=((1, 1.1), (8, 1.2))
)


@pytest.mark.parametrize("speed", [GATE.speed, None])
def test_the_gate_of_a_variant_travels_with_it(speed: tuple[tuple[int, float], ...] | None) -> None:
    metadata = tiny_metadata(precision="int8", gate=GATE.model_copy(update={"speed": speed}))
    assert from_props(to_props(metadata)) == metadata
