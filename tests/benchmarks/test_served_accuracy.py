import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import BenchmarkError
from benchmarks.generator import Records
from benchmarks.served_accuracy import (
    Figures,
    accuracy,
    check_checkpoint,
    compare_figures,
    compare_labels,
    equal,
    precision_of,
    read_answers,
    reported,
)
from service.engine.metadata import EvalMetrics
from tests.fakes import CLASSES, tiny_metadata

LABELS = tiny_metadata().labels


def answer(*indices: int, label: str | None = None) -> bytes:
    top = [{"label": label or LABELS[index], "index": index, "probability": 0.1} for index in indices]
    return json.dumps({"model": "tiny", "version": 1, "predictions": [{"filename": None, "top": top}]}).encode()


def test_answers_are_put_into_the_order_of_the_requests() -> None:
    records = Records(number=[1, 0], body=[answer(4, 0, 1, 2, 3), answer(2, 1, 0, 3, 4)])
    assert read_answers(records, LABELS).tolist() == [[2, 1, 0, 3, 4], [4, 0, 1, 2, 3]]


def test_a_label_that_is_not_that_of_its_index_is_found() -> None:
    records = Records(number=[0], body=[answer(0, 1, 2, 3, 4, label="class 0")])
    with pytest.raises(BenchmarkError, match="'class 0' is not the label of index 1"):
        read_answers(records, LABELS)


def test_accuracy() -> None:
    top = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 4, 2]])
    assert accuracy(top, np.array([0, 0, 0, 0]), "x") == Figures(0.25, 0.75, "x")


def test_figures_are_equal_when_they_count_the_same_images() -> None:
    served = Figures(0.5273, 0.8, "served")
    assert equal(served, Figures(0.5273 + 1e-12, 0.8, "report"), 10_000)
    assert not equal(served, Figures(0.5274, 0.8, "report"), 10_000)
    assert not equal(served, Figures(0.5273, 0.8001, "report"), 10_000)


def test_differing_labels_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logits = np.eye(CLASSES, dtype=np.float32)
    assert compare_labels(np.array([0, 1, 2, 3, 4]), logits) == 0
    assert compare_labels(np.array([0, 2, 2, 3, 0]), logits) == 2
    assert "image 1: served 2, torch 1 by 1 of a logit" in capsys.readouterr().out


def test_reported_figures_come_from_the_run_or_from_the_model(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"test": {"top1": 0.5, "top5": 0.75}}))
    assert reported(tmp_path, tiny_metadata()) == Figures(0.5, 0.75, "report.json")
    assert reported(tmp_path / "best.safetensors", tiny_metadata()) == Figures(0.5, 0.75, "report.json")
    assert reported(None, tiny_metadata()) is None
    metrics = EvalMetrics(split="test", n=4, top1=0.25, top5=1, loss=1, ece=0)
    assert reported(None, tiny_metadata(metrics=metrics)) == Figures(0.25, 1, "metadata")
    validation = metrics.model_copy(update={"split": "val"})
    assert reported(None, tiny_metadata(metrics=validation)) is None


@pytest.mark.parametrize("content", [None, "no JSON", "{}"])
def test_a_run_without_a_report_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(BenchmarkError, match="must be the report of a finished run"):
        reported(tmp_path, tiny_metadata())


def test_a_checkpoint_must_be_the_models_own(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    with pytest.raises(BenchmarkError, match="there is no such checkpoint"):
        check_checkpoint(tmp_path, tiny_metadata())
    path.write_bytes(b"weights")
    with pytest.raises(BenchmarkError, match="exported from another checkpoint"):
        check_checkpoint(tmp_path, tiny_metadata())
    sha256 = hashlib.sha256(b"weights").hexdigest()
    provenance = tiny_metadata().provenance.model_copy(update={"checkpoint_sha256": sha256})
    assert check_checkpoint(tmp_path, tiny_metadata(provenance=provenance)) == path
    assert check_checkpoint(path, tiny_metadata(provenance=provenance)) == path


def test_a_variant_may_lose_what_its_gate_allows_and_float32_nothing() -> None:
    torch = Figures(0.5930, 0.8, "torch")
    for top1, exact, good in ((0.593, True, True), (0.5929, True, False), (0.5901, False, True), (0.589, False, False)):
        assert compare_figures(Figures(top1, 0.8, "served"), torch, 10_000, exact=exact) is good


def test_the_services_precision_is_read() -> None:
    assert precision_of({}) == "auto"
    assert precision_of({"precision": "float32", "port": "1"}) == "float32"
    with pytest.raises(BenchmarkError, match="precision=half: must be one of auto, float32"):
        precision_of({"precision": "half"})
