"""Images that a run or one before it was trained on are known again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.training.commands import RECIPE
from tests.training.tiny import make_split
from training import seen_images
from training.__main__ import main
from training.data.dataset import Split
from training.report_schema import Report


def test_images_are_known_again_whatever_their_labels(tmp_path: Path) -> None:
    first, second = make_split(20, 1), make_split(10, 2)
    for name, split, origins in (("a", first, []), ("b", second, [tmp_path / "a", tmp_path / "nowhere"])):
        (tmp_path / name).mkdir()
        seen_images.write(tmp_path / name, split, origins)
    digests = seen_images.read(tmp_path / "b")
    assert len(digests) == 30
    assert seen_images.count_seen(Split(first.images[3:9], first.labels[:6]), digests) == 6
    assert seen_images.count_seen(second, seen_images.read(tmp_path / "a")) == 0
    for content in (b"no array", b""):
        (tmp_path / "a" / seen_images.FILE).write_bytes(content)
        assert len(seen_images.read(tmp_path / "a")) == 0
    assert len(seen_images.read(tmp_path / "nowhere")) == 0


@pytest.mark.usefixtures("without_figures")
def test_a_run_tells_which_images_trained_what_it_begins_with(
    tmp_path: Path, whole: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_dir, data)
    for name in ("000.png", "003.png"):
        (data / "train" / "ant" / name).rename(data / "test" / "ant" / f"seen-{name}")
    assert main([*RECIPE, "--epochs=1", "--data", str(data), "--init", str(whole), "--out", str(run)]) == 0
    assert "warning: 2 of the 8 test images have trained the run that --init or" in capsys.readouterr().out
    assert Report.model_validate_json((run / "report.json").read_text()).seen == {"test": 2}
    assert Report.model_validate_json((whole / "report.json").read_text()).seen == {}
    assert np.array_equal(seen_images.read(run), seen_images.read(whole))


def test_the_shipped_model_tells_what_it_was_trained_on() -> None:
    """49,000 images, of which a few are the same."""
    assert 48_900 < len(seen_images.read(Path("models/perceiver-cifar100/12"))) <= 49_000
