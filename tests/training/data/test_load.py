"""Where `load` looks, and its answers to paths that hold no data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.data_sets import write_cifar, write_folder, write_image
from training.data.cifar import FOLDER
from training.data.dataset import DataError
from training.data.load import load


def test_no_data_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: does not exist; --data takes a folder laid out as cifar-100-python"):
        load(tmp_path / "nowhere", input_size=8)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"archive\.zip: is a file; --data takes a folder"):
        load(tmp_path / "archive.zip", input_size=8)


def test_a_folder_of_neither_layout(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has no folders of images in it; --data takes a folder laid out as"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_validation_fraction_that_is_none(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"validation_fraction is {fraction}; it must lie between 0 and 1"):
        load(write_cifar(tmp_path / FOLDER), input_size=32, validation_fraction=fraction)


@pytest.mark.parametrize("at_parent", [True, False])
def test_an_incomplete_cifar_folder_is_told_from_an_image_folder(tmp_path: Path, at_parent: bool) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "meta").unlink()
    (folder / "train").unlink()
    with pytest.raises(DataError, match=f"{FOLDER}: lacks meta and train; unpack the whole"):
        load(tmp_path if at_parent else folder, input_size=32)


@pytest.mark.parametrize("cifar", [True, False])
def test_what_a_smaller_share_holds_out_is_part_of_what_a_larger_one_does(tmp_path: Path, cifar: bool) -> None:
    # Else a run that begins with another's weights would validate on images that those have seen.
    if cifar:
        write_cifar(tmp_path / FOLDER)
    else:
        write_folder(tmp_path, {"cat": 10, "dog": 10})
    few, many = (load(tmp_path, input_size=8, validation_fraction=fraction) for fraction in (0.2, 0.5))
    held_out = [{image.numpy().tobytes() for image in loaded.val.images} for loaded in (few, many)]
    assert (len(held_out[0]), len(held_out[1])) == (4, 10)
    assert held_out[0] < held_out[1]
    for loaded in (few, many):
        assert len(loaded.train) + len(loaded.val) == 20
        assert not loaded.has_val


def test_a_share_is_of_no_use_where_validation_images_are_given(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3)):
        write_folder(tmp_path / split, {"cat": count, "dog": count})
    for fraction in (0.2, 0.5):
        loaded = load(tmp_path, input_size=8, validation_fraction=fraction)
        assert (len(loaded.train), len(loaded.val), loaded.has_val) == (20, 6, True)
