"""Folders of the user's own images: classes, splits, and what can be wrong with them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data_sets import first_pixels, write_folder, write_image
from training.data import image_folder
from training.data.dataset import DataError
from training.data.image_folder import stratified_split
from training.data.load import load


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", {"dog": 3, "cat": 2, "big_ape": 10})
    loaded = load(tmp_path / "pets", input_size=8)
    assert loaded.name == "pets"
    assert loaded.labels == ("big_ape", "cat", "dog")
    assert loaded.test is None
    assert loaded.superclasses is None
    assert loaded.superclass_names is None
    assert loaded.train.images.dtype == loaded.val.images.dtype == torch.uint8
    assert loaded.train.labels.dtype == loaded.val.labels.dtype == torch.int64
    every = {0: range(200, 210), 1: range(100, 102), 2: range(3)}
    for split, counts in ((loaded.train, [9, 1, 2]), (loaded.val, [1, 1, 1])):
        assert torch.bincount(split.labels).tolist() == counts
        assert all(grey in every[label] for grey, label in zip(first_pixels(split), split.labels.tolist(), strict=True))
    assert sorted(first_pixels(loaded.train) + first_pixels(loaded.val)) == sorted(itertools.chain(*every.values()))


def test_the_folders_of_splits_are_used(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "val", {"dog": 2})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 3})
    loaded = load(tmp_path, input_size=8)
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 4
    assert first_pixels(loaded.train) == [0, 1, 2, 3, 100, 101, 102, 103]
    assert loaded.val.labels.tolist() == [1, 1]
    assert loaded.test.labels.tolist() == [0, 1, 1, 1]


def test_without_val_a_part_of_train_is_held_out_and_test_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 20, "dog": 10})
    write_folder(tmp_path / "test", {"cat": 2})
    loaded = load(tmp_path, input_size=8, validation_fraction=0.2)
    assert torch.bincount(loaded.val.labels).tolist() == [4, 2]
    assert torch.bincount(loaded.train.labels).tolist() == [16, 8]
    assert len(loaded.test) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 2, "plane": 2, "test": 2})
    loaded = load(tmp_path, input_size=8)
    assert loaded.labels == ("plane", "test", "train")
    assert loaded.test is None


@pytest.mark.parametrize("name", ["a.JPEG", "a.jfif", "a.png", "a.PNG", "a.WebP", "a.bmp", "a.gif", "a.tif", "a.TIFF"])
def test_formats_go_by_their_suffix_in_any_case(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_image(tmp_path / "test" / "cat" / name)
    assert len(load(tmp_path, input_size=8).test) == 1


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    told = ("cat/deep/a.png", "cat/notes.txt", "readme.md")
    for name in (".git/config", "cat/.hidden.png", *told):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    loaded = load(tmp_path, input_size=8)
    assert loaded.labels == ("cat", "dog")
    assert len(loaded.train) + len(loaded.val) == 4
    assert loaded.skipped_files == tuple(tmp_path / name for name in told)


def test_a_class_behind_a_dot_is_told_by_its_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2, ".22 calibre": 2, "cat/.thumbnails": 1})
    (tmp_path / ".22 calibre" / "notes.txt").write_text("")
    loaded = load(tmp_path, input_size=8)
    assert loaded.labels == ("cat", "dog")
    assert [file.parent.name for file in loaded.skipped_files] == [".22 calibre"] * 2


def test_what_lies_behind_links_is_told_as_well(tmp_path: Path) -> None:
    """Splits, and classes, that lie elsewhere."""
    write_folder(tmp_path / "train", {"cat": 2})
    write_folder(tmp_path / "elsewhere", {"dog": 2})
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(tmp_path / "train")
    for name in ("cat/a.heic", "dog/b.heic", "dog/deep/c.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text("")
    loaded = load(data, input_size=8)
    assert len(loaded.train) + len(loaded.val) == 4
    assert [str(file.relative_to(data / "train")) for file in loaded.skipped_files] == [
        "cat/a.heic", "dog/b.heic", "dog/deep/c.png"
    ]  # fmt: skip


def test_the_validation_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 30, "dog": 30})

    def held_out(seed: int) -> list[int]:
        return first_pixels(image_folder.load(tmp_path, input_size=8, validation_fraction=0.3, seed=seed).val)

    assert held_out(1) == held_out(1)
    assert held_out(1) != held_out(2)


def test_stratified_split_is_a_partition_with_each_class_in_proportion() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    training, validation = stratified_split(labels, 0.1, seed=0)
    assert sorted([*training, *validation]) == list(range(63))
    assert np.bincount(labels[validation], minlength=4).tolist() == [5, 1, 1, 0]
    assert list(training) == sorted(training)
    assert list(validation) == sorted(validation)
    # A class keeps its draw when another one grows.
    _, grown = stratified_split(np.repeat([0, 1, 2, 3], [50, 10, 2, 9]), 0.1, seed=0)
    assert set(validation) <= set(grown)


def test_stratified_split_leaves_a_image_to_train_with() -> None:
    training, validation = stratified_split(np.repeat([0, 1], [3, 2]), 0.99, seed=0)
    assert (len(training), len(validation)) == (2, 3)


def test_a_class_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "emu.txt").write_text("an emu")
    with pytest.raises(DataError, match=r"emu: this class folder has no images; put some in \(\.bmp .*\) or remove"):
        load(tmp_path, input_size=8)


def test_folders_one_level_too_deep(tmp_path: Path) -> None:
    write_folder(tmp_path / "animals" / "pets", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "plants" / "trees", {"oak": 2})
    with pytest.raises(DataError, match=r"animals: has folders where a class has images"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize(
    ("folder", "found"), [("", r"only one class folder \(cat\)"), ("train", r"only one class folder \(cat\)")]
)
def test_fewer_than_two_classes(tmp_path: Path, folder: str, found: str) -> None:
    write_folder(tmp_path / folder, {"cat": 2})
    with pytest.raises(DataError, match=f"has {found}; a classifier needs at least two"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_training_lacks(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / split, {"cat": 1, "emu": 1, "yak": 1})
    with pytest.raises(DataError, match=rf"{split}: has classes that the training images lack \(emu, yak\)"):
        load(tmp_path, input_size=8)


def test_an_empty_split_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test: has no class folder"):
        load(tmp_path, input_size=8)


def test_its_name_is_the_folders_unless_that_is_another_data_sets(tmp_path: Path) -> None:
    for name, expected in (("pets", "pets"), ("cifar100", "cifar100-folder")):
        write_folder(tmp_path / name, {"cat": 2, "dog": 2})
        assert load(tmp_path / name, input_size=8).name == expected


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="no class has two images, so none can be held out for validation"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (0, "The bytes are not an image; it must be a JPEG, PNG, WebP, BMP, GIF or TIFF file"),
        (5, "The bytes are not an image; it must be a JPEG, PNG, WebP, BMP, GIF or TIFF file"),
        (20_000, "The PNG image is truncated or damaged"),
    ],
)
def test_an_unreadable_image_is_named(tmp_path: Path, kept: int, reason: str) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 2})
    path = tmp_path / "cat" / "007.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"007\.png: this image cannot be read \({reason}.*\); replace it"):
        load(tmp_path, input_size=8)


def test_what_the_service_would_not_take_is_not_trained_on_under_another_name(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    path = tmp_path / "cat" / "000.png"
    Image.new("RGB", (16, 16), "teal").save(path, "ICO")
    with pytest.raises(
        DataError, match=r"000\.png: this image cannot be read \(ICO is not supported; save the image as a JPEG"
    ):
        load(tmp_path, input_size=8)
    # Two images in one JPEG, as phones write them.
    views = [Image.new("RGB", (16, 16), colour) for colour in ("teal", "red")]
    views[0].save(path, "MPO", save_all=True, append_images=views[1:])
    assert len(load(tmp_path, input_size=8).train) == 2


def break_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no image")


def test_all_unreadable_images_are_told_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 10})
    break_images(tmp_path, "cat/001.png", "cat/007.png", "dog/003.png")
    with pytest.raises(DataError) as caught:
        load(tmp_path, input_size=8)
    first, *others, last = str(caught.value).splitlines()
    assert first == "3 images cannot be read:"
    assert {line.partition(": this image")[0].strip() for line in others} == {
        str(tmp_path / name) for name in ("cat/001.png", "cat/007.png", "dog/003.png")
    }
    assert last == "Or leave out what cannot be read: --skip-unreadable."


def test_unreadable_images_are_left_out_if_asked_and_the_others_stay_where_they_were(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 10})
    whole = load(tmp_path, input_size=8)
    break_images(tmp_path, "cat/001.png", "dog/003.png")
    left = load(tmp_path, input_size=8, skip_unreadable=True)
    assert set(left.unreadable_files) == {tmp_path / "cat/001.png", tmp_path / "dog/003.png"}
    assert len(left.train) + len(left.val) == 18
    for split, before in ((left.train, whole.train), (left.val, whole.val)):
        kept = {(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}
        assert kept <= {
            (image.numpy().tobytes(), int(k)) for image, k in zip(before.images, before.labels, strict=True)
        }


def test_a_class_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 2})
    break_images(tmp_path, "dog/000.png", "dog/001.png")
    with pytest.raises(DataError, match="Without them the class dog has no training image"):
        load(tmp_path, input_size=8, skip_unreadable=True)


@pytest.mark.parametrize(("one", "other"), [("caf\u00e9", "cafe\u0301"), ("cat", "cat "), (" cat", "cat")])
def test_class_names_that_differ_only_in_what_nobody_sees(tmp_path: Path, one: str, other: str) -> None:
    write_folder(tmp_path / "flat", {one: 2, other: 2})
    with pytest.raises(DataError, match="differ only by their Unicode form or by blanks"):
        load(tmp_path / "flat", input_size=8)
    write_folder(tmp_path / "split" / "train", {one: 2, "dog": 2})
    write_folder(tmp_path / "split" / "val", {other: 2, "dog": 2})
    with pytest.raises(DataError, match="of the training images only by its Unicode form or by blanks"):
        load(tmp_path / "split", input_size=8)
