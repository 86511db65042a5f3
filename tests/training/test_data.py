"""Data sets from folders and from an archive, on small fabricated ones, and all that can be wrong with them."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import data, download
from training.cifar import FOLDER, MEMBERS, read_pickle
from training.data import DataError, DataSet, load
from training.image_folder import stratified_split

# --- fabricated data


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 and its numpy wrote the official files: one kind of string, integers for booleans."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, obj: str | bytes) -> None:
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = save_string
    dispatch[str] = save_string

    def save_bool(self, obj: bool) -> None:
        self.save_long(int(obj))

    dispatch[bool] = save_bool

    def save_global(self, obj: object, name: str | None = None) -> None:
        # Python 2 knew numpy before it was reorganised.
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global
    dispatch[type(download.download)] = save_global


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def cifar_split(count: int, seed: int) -> dict[str, object]:
    """``count`` pictures of four classes, of which 0 and 2 are of superclass 1 and the others of superclass 0."""
    fine = [index % 4 for index in range(count)]
    return {
        "batch_label": "a batch",
        "fine_labels": fine,
        "coarse_labels": [1 - label % 2 for label in fine],
        "data": np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"picture_{index}.png" for index in range(count)],
    }


META = {"fine_label_names": ["ant", "oak_tree", "bee", "elm"], "coarse_label_names": ["plants", "insects"]}
CONTENTS = {"meta": META, "train": cifar_split(20, 1), "test": cifar_split(6, 2)}


def write_cifar(folder: Path, dump: Callable[[object], bytes] = python2_pickle) -> Path:
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(dump(content))
    return folder


def write_picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_folder(path: Path, counts: dict[str, int]) -> Path:
    """``counts[name]`` pictures of each class, each of a grey of its own."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_picture(path / name / f"{index:03d}.png", (100 * label + index,) * 3)
    return path


def first_pixels(split: data.Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def assert_same(one: DataSet, other: DataSet) -> None:
    assert one.labels == other.labels
    for a, b in zip((one.train, one.val, one.test), (other.train, other.val, other.test), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


# --- CIFAR-100


def test_the_fabricated_pickles_are_python_2s() -> None:
    raw = python2_pickle(CONTENTS["train"])
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert b"_codecs" not in raw
    assert pickle.NEWTRUE not in python2_pickle(np.zeros(1, np.uint8))
    assert set(pickle.loads(raw, encoding="bytes")) >= {b"data", b"fine_labels"}


def test_cifar_is_read_in_order_channels_last(tmp_path: Path) -> None:
    loaded = load(write_cifar(tmp_path / FOLDER), input_size=32)
    assert loaded.name == "cifar100"
    assert loaded.labels == ("ant", "oak_tree", "bee", "elm")
    assert loaded.superclasses == (1, 0, 1, 0)
    assert loaded.superclass_names == ("plants", "insects")
    raw = CONTENTS["test"]["data"]
    assert loaded.test.images.dtype == torch.uint8
    assert loaded.test.labels.dtype == torch.int64
    assert loaded.test.images.shape == (6, 32, 32, 3)
    assert loaded.test.images[5, 3, 7, 2] == raw[5, 2 * 1024 + 3 * 32 + 7]
    assert loaded.test.labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_cifar_validation_is_the_last_tenth_of_training(tmp_path: Path) -> None:
    loaded = load(write_cifar(tmp_path / FOLDER), input_size=32, seed=5)
    assert len(loaded.train) == 18
    assert len(loaded.val) == 2
    assert loaded.val.images[0, 0, 0, 0] == CONTENTS["train"]["data"][18, 0]
    assert loaded.val.labels.tolist() == [2, 3]
    half = load(tmp_path / FOLDER, input_size=32, validation_fraction=0.5)
    assert (len(half.train), len(half.val)) == (10, 10)


def test_cifar_is_found_at_the_folder_and_at_its_parent(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    assert_same(load(folder, input_size=32), load(tmp_path, input_size=32))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_of_any_pickle_protocol_is_the_same(tmp_path: Path, protocol: int) -> None:
    official = load(write_cifar(tmp_path / "a"), input_size=32)
    written_again = write_cifar(tmp_path / "b", lambda content: pickle.dumps(content, protocol))
    assert_same(official, load(written_again, input_size=32))


def test_cifar_is_brought_to_another_size(tmp_path: Path) -> None:
    loaded = load(write_cifar(tmp_path / FOLDER), input_size=16)
    assert loaded.train.images.shape == (18, 16, 16, 3)
    whole = load(tmp_path / FOLDER, input_size=32).train.images[0].numpy()
    expected = Image.fromarray(whole).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(loaded.train.images[0], np.asarray(expected))


def run_command(command: str) -> object:
    """Stands for what a malicious pickle calls."""
    raise AssertionError(f"the pickle has run {command!r}")


class Malicious:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Malicious(run_command, "rm -rf"),
        Malicious(eval, "1/0"),
        Malicious(getattr, np.ndarray, "tofile"),
        Malicious(np.load, "file.npy", None, True),
        Malicious(threading.Thread),
        {"data": [1, Malicious(run_command, "nested")]},
    ],
    ids=["function", "builtin", "getattr", "numpy", "class", "nested"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path: Path, attack: object, protocol: int) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "train").write_bytes(pickle.dumps(attack, protocol))
    with pytest.raises(DataError, match=r"train: is not the official CIFAR-100 file.*is not admitted"):
        load(tmp_path, input_size=32)


def test_dotted_names_do_not_lead_out_of_what_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(DataError, match=r"numpy\.ndarray\.tofile is not admitted"):
        read_pickle(path)


def test_only_the_latin1_encoding_of_protocol_2_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.")
    with pytest.raises(DataError, match="encoding 'hex' is not admitted"):
        read_pickle(path)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_pickle_is_named(tmp_path: Path, member: str, share: float) -> None:
    path = write_cifar(tmp_path / FOLDER) / member
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=f"{member}: is not the official CIFAR-100 file, or only a part of it"):
        load(tmp_path, input_size=32)


@pytest.mark.parametrize(
    ("member", "changes", "message"),
    [
        ("train", {"data": np.zeros((20, 3071), np.uint8)}, r"train: 'data' must be an array of uint8 \[N, 3072\]"),
        ("train", {"data": np.zeros((20, 3072))}, r"train: 'data' must be an array of uint8 \[N, 3072\]"),
        ("train", {"data": b"pixels"}, r"train: 'data' must be an array of uint8 \[N, 3072\]"),
        ("test", {"data": np.zeros((0, 3072), np.uint8)}, "test: holds no picture"),
        ("train", {"fine_labels": [0] * 19}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": [4] * 20}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": [0.5] * 20}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": None}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"coarse_labels": [-1] * 20}, "train: 'coarse_labels' must hold 20 numbers from 0 to 1"),
        ("train", {"fine_labels": [0, 1] * 10}, "train: every one of the 4 classes must have pictures"),
        ("train", {"coarse_labels": [0] * 19 + [1]}, "train: every one of the 4 classes .* all of one superclass"),
        ("meta", {"fine_label_names": []}, "meta: has no list of names under 'fine_label_names'"),
        ("meta", {"coarse_label_names": [1, 2]}, "meta: has no list of names under 'coarse_label_names'"),
    ],
)
def test_what_is_wrong_with_a_cifar_file_is_said(
    tmp_path: Path, member: str, changes: dict[str, object], message: str
) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / member).write_bytes(pickle.dumps(CONTENTS[member] | changes))
    with pytest.raises(DataError, match=message):
        load(tmp_path, input_size=32)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "meta").write_bytes(pickle.dumps(["ant"]))
    with pytest.raises(DataError, match="meta: holds a list where the official file holds a dictionary"):
        load(tmp_path, input_size=32)


@pytest.mark.parametrize("at_parent", [True, False])
def test_an_incomplete_cifar_folder_is_told_from_an_image_folder(tmp_path: Path, at_parent: bool) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "meta").unlink()
    (folder / "train").unlink()
    with pytest.raises(DataError, match=f"{FOLDER}: lacks meta and train; unpack the whole"):
        load(tmp_path if at_parent else folder, input_size=32)


# --- image folders


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


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    for name in (".git/config", "cat/.hidden.png", "cat/notes.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    loaded = load(tmp_path, input_size=8)
    assert loaded.labels == ("cat", "dog")
    assert len(loaded.train) + len(loaded.val) == 4


def test_the_validation_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 30, "dog": 30})

    def held_out(seed: int) -> list[int]:
        return first_pixels(load(tmp_path, input_size=8, validation_fraction=0.3, seed=seed).val)

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


def test_stratified_split_leaves_a_picture_to_train_with() -> None:
    training, validation = stratified_split(np.repeat([0, 1], [3, 2]), 0.99, seed=0)
    assert (len(training), len(validation)) == (2, 3)


# --- pictures


def read_one(tmp_path: Path) -> np.ndarray:
    """The picture, loaded as the test split of an otherwise plain folder."""
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    return load(tmp_path, input_size=8).test.images[0].numpy()


@pytest.fixture
def picture_path(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        path = tmp_path / "test" / "cat" / name
        path.parent.mkdir(parents=True)
        return path

    return make


PATTERN = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.TIFF", "a.WebP", "a.PNG"])
def test_a_picture_of_the_right_size_passes_untouched(
    tmp_path: Path, picture_path: Callable[[str], Path], name: str
) -> None:
    Image.fromarray(PATTERN).save(picture_path(name), **({"lossless": True} if "WebP" in name else {}))
    np.testing.assert_array_equal(read_one(tmp_path), PATTERN)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.gif"])
def test_lossy_formats_are_read(tmp_path: Path, picture_path: Callable[[str], Path], name: str) -> None:
    path = picture_path(name)
    Image.fromarray(PATTERN).save(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(read_one(tmp_path), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("size", [(20, 10), (10, 20)])
def test_another_size_is_cropped_to_its_centre(
    tmp_path: Path, picture_path: Callable[[str], Path], size: tuple[int, int]
) -> None:
    # Grey in the centred square, white around it: of the white only a trace comes over the edges.
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    top, left = (size[1] - 10) // 2, (size[0] - 10) // 2
    pixels[top : top + 10, left : left + 10] = 90
    Image.fromarray(pixels).save(picture_path("a.png"))
    np.testing.assert_allclose(read_one(tmp_path), 90, atol=6)


def test_another_size_is_resized_by_the_bicubic_filter(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture.save(picture_path("a.png"))
    expected = picture.resize((8, 8), Image.Resampling.BICUBIC, box=(5, 0, 25, 20))
    np.testing.assert_array_equal(read_one(tmp_path), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 8), (9, 8)])
def test_any_size_is_brought_to_the_right_one(
    tmp_path: Path, picture_path: Callable[[str], Path], size: tuple[int, int]
) -> None:
    Image.new("RGB", size, (10, 20, 30)).save(picture_path("a.png"))
    read = read_one(tmp_path)
    assert read.shape == (8, 8, 3)
    assert (read == (10, 20, 30)).all()


def test_exif_orientation_is_honoured(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    Image.fromarray(PATTERN).save(picture_path("a.png"), exif=exif)
    np.testing.assert_array_equal(read_one(tmp_path), np.rot90(PATTERN, -1))


def test_transparency_stands_on_white(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    pixels = np.dstack([PATTERN, np.full((8, 8), 255, np.uint8)])
    pixels[0, 0, 3] = 0
    pixels[0, 1] = (0, 100, 200, 127)
    Image.fromarray(pixels).save(picture_path("a.png"))
    read = read_one(tmp_path)
    assert read[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(read[0, 1], [128, 178, 228], atol=1)
    np.testing.assert_array_equal(read[1:], PATTERN[1:])


def test_a_transparent_palette_stands_on_white(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([200, 0, 0, 0, 100, 50])
    picture.putpixel((0, 0), 0)
    picture.save(picture_path("a.png"), transparency=0)
    read = read_one(tmp_path)
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[4, 4].tolist() == [0, 100, 50]


def test_sixteen_bits_are_scaled(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    levels = np.full((8, 8), 65535, np.uint16)
    levels[0, :4] = [0, 257, 128, 32768]
    Image.fromarray(levels).save(picture_path("a.png"))
    read = read_one(tmp_path)
    assert read[0, :, 0].tolist() == [0, 1, 0, 128, 255, 255, 255, 255]
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, picture_path: Callable[[str], Path], mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(picture_path(name))
    assert (read_one(tmp_path) == 255).all()


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path, picture_path: Callable[[str], Path]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(picture_path("a.gif"), save_all=True, append_images=frames[1:])
    assert read_one(tmp_path)[0, 0].tolist() == [255, 0, 0]


# --- what can be wrong with a folder


def test_no_data_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: does not exist; --data takes a folder laid out as cifar-100-python"):
        load(tmp_path / "nowhere", input_size=8)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"archive\.zip: is a file; --data takes a folder"):
        load(tmp_path / "archive.zip", input_size=8)


def test_a_folder_of_neither_layout(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has no folders of pictures in it; --data takes a folder laid out as"):
        load(tmp_path, input_size=8)


def test_a_class_without_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "emu.txt").write_text("an emu")
    with pytest.raises(DataError, match=r"emu: this class folder has no pictures; put some in \(\.bmp .*\) or remove"):
        load(tmp_path, input_size=8)


def test_folders_one_level_too_deep(tmp_path: Path) -> None:
    write_folder(tmp_path / "animals" / "pets", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "plants" / "trees", {"oak": 2})
    with pytest.raises(DataError, match=r"animals: has folders where a class has pictures"):
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
    with pytest.raises(DataError, match=rf"{split}: has classes that the training pictures lack \(emu, yak\)"):
        load(tmp_path, input_size=8)


def test_an_empty_split_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test: has no class folder"):
        load(tmp_path, input_size=8)


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="no class has two pictures, so none can be held out for validation"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [(0, "its format is unknown"), (5, "its format is unknown"), (20_000, "image file is truncated")],
)
def test_an_unreadable_picture_is_named(tmp_path: Path, kept: int, reason: str) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 2})
    path = tmp_path / "cat" / "007.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"007\.png: this picture cannot be read \({reason}.*\); replace it"):
        load(tmp_path, input_size=8)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_validation_fraction_that_is_none(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"validation_fraction is {fraction}; it must lie between 0 and 1"):
        load(write_cifar(tmp_path / FOLDER), input_size=32, validation_fraction=fraction)


# --- the archive


def tar_of(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(info)
    return file.getvalue()


def archive_bytes() -> bytes:
    files = {f"{FOLDER}/{name}": python2_pickle(content) for name, content in CONTENTS.items()}
    return tar_of({f"{FOLDER}/file.txt~": b"", **files})


class Server:
    """A real HTTP server of one file, which may break off, ignore ranges or answer with an error."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.resumes = True
        self.break_off_after: int | None = None
        self.status: int | None = None
        self.ranges: list[str | None] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/archive.tar.gz"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                server.ranges.append(wanted)
                offset = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.resumes else 0
                if server.status is not None or offset >= len(server.content):
                    self.send_error(server.status or 416)
                    return
                body = server.content[offset:]
                self.send_response(206 if offset else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.break_off_after])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
                """Keep the tests' output clean."""

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(archive_bytes())
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def fetch(server: Server, cache_dir: Path, md5: str | None = None) -> Path:
    right = hashlib.md5(server.content).hexdigest()
    return download.ensure_cifar100(cache_dir, url=server.url, md5=md5 or right)


def test_the_official_archive_is_asked_for() -> None:
    assert download.ARCHIVE_URL == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert download.ARCHIVE_MD5 == "eb9058c3a382ffc7106e4002c42a8d85"


def test_download_unpacks_the_three_files_only(tmp_path: Path, server: Server) -> None:
    folder = fetch(server, tmp_path / "deep" / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["meta", "test", "train"]
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob(".unpacking*"))
    assert_same(load(None, input_size=32, cache_dir=tmp_path / "deep" / "cache"), load(folder, input_size=32))


def test_nothing_is_downloaded_twice(tmp_path: Path, server: Server) -> None:
    folder = fetch(server, tmp_path)
    assert fetch(server, tmp_path) == folder
    (folder / "test").unlink()  # the archive is still there
    assert fetch(server, tmp_path) == folder
    assert (folder / "test").is_file()
    assert server.ranges == [None]


def test_download_goes_on_where_it_broke_off(tmp_path: Path, server: Server) -> None:
    server.break_off_after = 50_000
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=50000-"]


def test_a_later_run_goes_on_where_the_first_gave_up(tmp_path: Path, server: Server) -> None:
    server.break_off_after = 100
    with pytest.raises(DataError, match=r"the connection broke off.*run the same command again to go on"):
        fetch(server, tmp_path)
    assert (tmp_path / f"{FOLDER}.tar.gz.partial").stat().st_size == 300
    server.break_off_after = None
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges[-1] == "bytes=300-"


def test_a_server_that_does_not_resume_sends_everything(tmp_path: Path, server: Server) -> None:
    server.resumes = False
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(server.content[:100])
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges == ["bytes=100-"]


def test_a_complete_partial_file_is_used(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(server.content)
    assert fetch(server, tmp_path).is_dir()


def test_a_wrong_checksum_is_refused_and_the_file_deleted(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"MD5 checksum [0-9a-f]{32} where 0{32} is right; .* has been deleted"):
        fetch(server, tmp_path, md5="0" * 32)
    assert not (tmp_path / FOLDER).exists()
    assert not list(tmp_path.glob("*.tar.gz*"))


def test_a_damaged_partial_file_heals_with_the_second_run(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(b"junk")
    with pytest.raises(DataError, match="has been deleted"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).is_dir()


def test_an_archive_that_lay_there_is_verified_and_kept(tmp_path: Path, server: Server) -> None:
    archive = tmp_path / f"{FOLDER}.tar.gz"
    archive.write_bytes(server.content[:-1])
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz: has the MD5 checksum .*; remove it"):
        fetch(server, tmp_path)
    assert archive.exists()
    archive.write_bytes(server.content)
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges == []


def test_an_error_of_the_server_is_passed_on(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(DataError, match=r"cannot be downloaded \(Not Found\)"):
        fetch(server, tmp_path)


def test_without_a_network_local_data_are_named_as_the_way_out(tmp_path: Path) -> None:
    gone = Server(b"")
    gone.http.server_close()
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*refused\).* or pass --data with a local folder"):
        fetch(gone, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: cannot be written \(.*\), so CIFAR-100 cannot be downloaded"):
        fetch(server, tmp_path / "cache")


def test_several_loaders_download_once(tmp_path: Path, server: Server) -> None:
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load(tmp_path, input_size=32).labels
    assert server.ranges == [None]


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_refused(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    files = {f"{FOLDER}/{name}": b"content" for name in ("meta", "test")}
    (tmp_path / "a.tar.gz").write_bytes(tar_of({**files, f"{FOLDER}/train": link(kind, str(secret))}))
    with pytest.raises(DataError, match=r"cifar-100-python/train must be a plain file"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / FOLDER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "secret"]


def test_no_path_of_an_archive_is_followed(tmp_path: Path) -> None:
    """A link for the folder, names that climb or start at the root: nothing is written but the three files."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    files: dict[str, bytes | tarfile.TarInfo] = {f"{FOLDER}/{name}": name.encode() for name in MEMBERS}
    climbing = {"../climbed": b"", f"{outside}/absolute": b"", f"{FOLDER}/../../climbed": b""}
    content = tar_of({FOLDER: link(tarfile.SYMTYPE, str(outside)), **climbing, **files})
    (inside / "a.tar.gz").write_bytes(content)
    download.unpack(inside / "a.tar.gz", inside / FOLDER)
    assert sorted(path.name for path in (inside / FOLDER).iterdir()) == ["meta", "test", "train"]
    assert not (inside / FOLDER).is_symlink()
    assert not list(outside.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]


@pytest.mark.parametrize("damage", ["junk", "truncated", "flipped", "a member missing"])
def test_a_broken_archive_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    whole = archive_bytes()
    content = {
        "junk": b"not a tar",
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:20] + bytes(255 - byte for byte in whole[20:70]) + whole[70:],
        "a member missing": tar_of({f"{FOLDER}/meta": b"content"}),
    }[damage]
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar\.gz: is not the official archive \(.*\); remove it"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
