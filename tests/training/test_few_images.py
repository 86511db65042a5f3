"""A preset on a handful of images: what becomes of its batch, and what the user is told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.training.data_sets import write_folder, write_image
from tests.training.tiny import FLAGS
from training import checkpoint
from training.__main__ import main
from training.distributed import World
from training.run import reduce_batch_size


@pytest.mark.parametrize(
    ("batch_size", "images", "processes", "expected"),
    [
        (256, 45_000, 2, 256),
        (256, 769, 1, 256),  # four steps, the last filled up
        (256, 768, 1, 128),
        (256, 145, 1, 32),
        (256, 145, 8, 32),
        (256, 2, 1, 8),  # no smaller
        (48, 2, 8, 24),  # each process still has as many
        (9, 2, 1, 9),
    ],
)
def test_the_batch_of_few_images(batch_size: int, images: int, processes: int, expected: int) -> None:
    assert reduce_batch_size(batch_size, images, World(0, processes, torch.device("cpu"))) == expected


@pytest.mark.usefixtures("without_figures")
def test_few_images_are_told_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A class of two images, and one of one, which cannot be validated; warm-up as long as the run.
    data = write_folder(tmp_path / "data", {"ant": 6, "bee": 2, "cow": 1})
    for name in ("a.heic", "b.heic", os.fsdecode(b"c\xe9.txt")):
        (data / "ant" / name).write_text("")
    flags = [*FLAGS, "--epochs=1", "--threads=1", "--device=cpu", "--data", str(data)]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "warning: 7 training images are few: a step takes 8 of them and not the preset's 256" in output
    unseen = "warning: no validation image of cow: no figure tells how well that is known; a class needs two images."
    assert unseen in output
    assert (
        f"warning: 3 files are passed over (2 .heic, 1 .txt), the first is {data}/ant/a.heic: images lie in" in output
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["batch_size"] == 8
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["val"]["n"], report["training_pictures"], report["test"]) == (2, 7, None)
    assert "taken for a class" not in output
    # Who names a batch gets it, larger than the data as it may be.
    assert main([*flags, "--out", str(tmp_path / "named"), "--batch-size=20"]) == 0
    assert "are few" not in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "named" / "last.safetensors")[1].step == 1


@pytest.mark.usefixtures("without_figures")
def test_a_class_that_looks_like_a_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Test images without labels beside folders of classes, say."""
    data = write_folder(tmp_path / "data", {"ant": 6, "bee": 6, "test": 3})
    flags = [*FLAGS, "--epochs=1", "--threads=1", "--device=cpu", "--max-steps=1"]
    assert main([*flags, "--data", str(data), "--out", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().out
    assert f"warning: {data}/test: taken for a class of that name, since the images are not laid out as DIR/" in said
    for name in ("ant", "bee", "test"):  # here there is no doubt
        (data / "train").mkdir(exist_ok=True)
        (data / name).rename(data / "train" / name)
    assert main([*flags, "--data", str(data), "--out", str(tmp_path / "again")]) == 3
    assert "taken for a class" not in capsys.readouterr().out


@pytest.mark.usefixtures("without_figures")
def test_splits_that_lack_a_class_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, counts in (("train", {"ant": 6, "bee": 6}), ("val", {"ant": 3}), ("test", {"bee": 3})):
        write_folder(tmp_path / "data" / name, counts)
    flags = [*FLAGS, "--epochs=1", "--threads=1", "--device=cpu", "--max-steps=1"]
    assert main([*flags, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().out
    assert "warning: no validation image of bee: no figure tells how well that is known; put some into val/." in said
    assert "warning: no test image of ant: no figure tells how well that is known; put some into test/." in said


@pytest.mark.usefixtures("without_figures")
def test_copies_of_training_pictures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of another format in another class, and a link; not those that train twice."""
    data = tmp_path / "data"
    for split, first in (("train", 0), ("val", 50), ("test", 80)):
        for label, name in enumerate(("ant", "bee")):
            for index in range(3):
                write_image(data / split / name / f"{index}.png", (first + 10 * label + index,) * 3)
    flags = [*FLAGS, "--epochs=2", "--threads=1", "--device=cpu", "--data", str(data), "--max-steps=1"]
    shutil.copyfile(data / "train" / "ant" / "0.png", data / "train" / "ant" / "again.png")
    assert main([*flags, "--out", str(tmp_path / "apart")]) == 3
    assert "flatter" not in capsys.readouterr().out
    write_image(data / "val" / "bee" / "copy.bmp", (1, 1, 1))
    for index in range(2):
        (data / "test" / "ant" / f"link{index}.png").symlink_to(data / "train" / "ant" / f"{index}.png")
    assert main([*flags, "--out", str(tmp_path / "mixed")]) == 3
    told = capsys.readouterr().out
    assert "warning: 1 of the 7 validation images is a copy of training images: the figures" in told
    assert "warning: 2 of the 8 test images are copies of training images: the figures" in told
