"""CIFAR-100 in its official layout, and pickles that are damaged, hostile or of something else."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data_sets import CONTENTS, assert_same, python2_pickle, write_cifar
from training.data.cifar import FOLDER, MEMBERS, read_pickle
from training.data.dataset import DataError
from training.data.load import load


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
    loaded = load(write_cifar(tmp_path / FOLDER), input_size=32)
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
    with pytest.raises(DataError, match=r"train: is not the official CIFAR-100 file.*is not allowed"):
        load(tmp_path, input_size=32)


def test_dotted_names_do_not_lead_out_of_what_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(DataError, match=r"numpy\.ndarray\.tofile is not allowed"):
        read_pickle(path)


def test_only_the_latin1_encoding_of_protocol_2_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.")
    with pytest.raises(DataError, match="encoding 'hex' is not allowed"):
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
        ("test", {"data": np.zeros((0, 3072), np.uint8)}, "test: holds no image"),
        ("train", {"fine_labels": [0] * 19}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": [4] * 20}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": [0.5] * 20}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"fine_labels": None}, "train: 'fine_labels' must hold 20 numbers from 0 to 3"),
        ("train", {"coarse_labels": [-1] * 20}, "train: 'coarse_labels' must hold 20 numbers from 0 to 1"),
        ("train", {"fine_labels": [0, 1] * 10}, "train: every one of the 4 classes must have images"),
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
