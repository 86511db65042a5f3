"""Decoded images on disk: the same as in memory, decoded once, and shared."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data_sets import write_folder
from tests.training.tiny import FLAGS
from training import checkpoint
from training.__main__ import main
from training.data import decoded, image_files
from training.data.dataset import DataError, DataSet
from training.data.load import load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of noise in two classes; what is decoded goes below the current folder."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pets", {"cat": 8, "dog": 8})
    generator = np.random.default_rng(0)
    for file in sorted((tmp_path / "pets").rglob("*.*")):
        Image.fromarray(generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(file.with_suffix(".png"))
    return tmp_path / "pets"


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "MIN_BYTES", 1)


def assert_same(mine: DataSet, theirs: DataSet) -> None:
    for split, other in ((mine.train, theirs.train), (mine.val, theirs.val)):
        assert torch.equal(split.images, other.images)
        assert torch.equal(split.labels, other.labels)
    assert mine.digest() == theirs.digest()


def test_what_is_mapped_is_what_lies_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load(folder, input_size=12)
    assert in_memory.train.file is None
    assert not decoded.FOLDER.exists()
    monkeypatch.setattr(decoded, "MIN_BYTES", 1)
    mapped = load(folder, input_size=12)
    assert mapped.train.file is not None
    assert_same(mapped, in_memory)


@pytest.mark.usefixtures("on_disk")
def test_images_are_decoded_once_for_their_content_and_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder, input_size=12)
    folder = folder.rename(folder.with_name("renamed"))
    read: list[Path] = []

    def read_image(path: Path, size: int) -> np.ndarray:
        read.append(path)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(image_files, "read_image", read_image)
    assert_same(load(folder, input_size=12), first)
    assert read == []
    count = len(first.train) + len(first.val)
    assert load(folder, input_size=10).train.file != first.train.file
    assert len(read) == count
    read.clear()
    changed = next(folder.rglob("*.png"))
    changed.write_bytes(changed.read_bytes() + b" ")
    load(folder, input_size=12)
    assert len(read) in (len(first.train), len(first.val))  # those of the split that it is in


@pytest.mark.usefixtures("on_disk")
def test_unreadable_images_are_told_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = folder / "cat" / "damaged.png"
    damaged.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"damaged\.png: this image cannot be read"):
            load(folder, input_size=12)
        left = load(folder, input_size=12, skip_unreadable=True)
        assert left.unreadable_files == (damaged,)
    monkeypatch.setattr(decoded, "MIN_BYTES", 1 << 30)
    assert_same(left, load(folder, input_size=12, skip_unreadable=True))


@pytest.mark.usefixtures("on_disk")
def test_a_folder_of_which_nothing_can_be_read_is_told(folder: Path) -> None:
    for file in folder.rglob("*.*"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="images cannot be read:"):
        load(folder, input_size=12)


@pytest.mark.usefixtures("on_disk")
def test_what_was_not_written_to_its_end_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        read_image = image_files.read_image

        def interrupted(path: Path, size: int) -> np.ndarray:
            if path.stem.endswith("5"):
                raise KeyboardInterrupt
            return read_image(path, size)

        patch.setattr(image_files, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folder, input_size=12)
    assert list(decoded.FOLDER.iterdir()) == []
    monkeypatch.setattr(decoded, "MIN_BYTES", 1 << 30)
    in_memory = load(folder, input_size=12)
    monkeypatch.setattr(decoded, "MIN_BYTES", 1)
    assert_same(load(folder, input_size=12), in_memory)


@pytest.mark.usefixtures("on_disk")
def test_a_full_disk_is_told_with_what_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded, "store", full)
    with pytest.raises(DataError, match=r"cannot hold the decoded images, 0\.0 GB .*No space left.* --input-size"):
        load(folder, input_size=12)


@pytest.mark.usefixtures("on_disk")
def test_what_filled_the_disk_up_is_no_harm_once_there_is_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_args: object, **_options: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(DataError, match="make room there"):
            load(folder, input_size=12)
    assert len(load(folder, input_size=12).train)


@pytest.mark.usefixtures("on_disk")
def test_another_process_maps_the_same_file(folder: Path) -> None:
    mapped = load(folder, input_size=64)
    stream = pickle.dumps(mapped.train)
    assert len(stream) < mapped.train.images.numel() / 2
    received = pickle.loads(stream)
    assert received.file == mapped.train.file
    assert torch.equal(received.images, mapped.train.images)
    received.images.zero_()  # what one process writes, no other sees
    assert mapped.train.images.any()


@pytest.mark.usefixtures("without_figures")
def test_a_run_learns_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, least in (("memory", 1 << 30), ("disk", 1)):
        monkeypatch.setattr(decoded, "MIN_BYTES", least)
        flags = [*FLAGS, "--epochs=2", "--batch-size=4", "--precision=float32", "--threads=1"]
        assert main([*flags, "--data", str(folder), "--out", name]) == 0
    one, other = (checkpoint.load(Path(name) / "best.safetensors")[0] for name in ("memory", "disk"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
