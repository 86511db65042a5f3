"""A version appears whole or not at all, and one after the other."""

import multiprocessing
from pathlib import Path

import pytest

from export.publish import new_version
from service.engine.metadata import MODEL_FILE, ArtifactError
from service.repository.folder import list_versions


def test_a_new_version_appears_at_once_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "name"
    for expected in (1, 2):
        with new_version(folder) as (number, path):
            assert number == expected
            (path / MODEL_FILE).write_text("weights")
            assert len(list_versions(folder)) == expected - 1
        assert (folder / str(expected) / MODEL_FILE).read_text() == "weights"
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]
    assert (folder / "1").stat().st_mode & 0o055 == 0o055  # a service of another user can read it


def test_the_next_version_is_one_above_the_highest(tmp_path: Path) -> None:
    (tmp_path / "41").mkdir()
    with new_version(tmp_path) as (number, _):
        assert number == 42


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def export() -> None:
        with new_version(tmp_path) as (_, path):
            (path / MODEL_FILE).write_text("half")
            raise RuntimeError("the gate")

    with pytest.raises(RuntimeError, match="the gate"):
        export()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_version_is_never_overwritten(tmp_path: Path) -> None:
    def export() -> None:
        with new_version(tmp_path) as (_, path):
            (path / MODEL_FILE).write_text("mine")
            (tmp_path / "1").mkdir()  # another exporter was faster
            (tmp_path / "1" / MODEL_FILE).write_text("theirs")

    with pytest.raises(ArtifactError, match="never overwritten"):
        export()
    assert (tmp_path / "1" / MODEL_FILE).read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


def write_one(folder: Path, started: object, go_on: object) -> None:
    with new_version(folder) as (_, path):
        started.set()  # type: ignore[attr-defined]
        go_on.wait(60)  # type: ignore[attr-defined]
        (path / MODEL_FILE).write_text("theirs")


def test_who_comes_second_waits_for_the_first_and_sees_its_version(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    started, later, go_on = processes.Event(), processes.Event(), processes.Event()
    first = processes.Process(target=write_one, args=(tmp_path, started, go_on))
    first.start()
    assert started.wait(60)
    writing = [entry.name for entry in tmp_path.iterdir()]
    assert [name.startswith(".1-export-") for name in writing] == [True]
    second = processes.Process(target=write_one, args=(tmp_path, later, go_on))
    second.start()
    assert not later.wait(3)
    assert second.is_alive()
    assert [entry.name for entry in tmp_path.iterdir()] == writing
    go_on.set()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


def test_what_a_killed_export_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".3-export-ab_12xyz", ".3", ".3-mine", "3", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL_FILE).write_text("half")
    with new_version(tmp_path) as (number, path):
        assert number == 4
        (path / MODEL_FILE).write_text("weights")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".3", ".3-mine", "3", "4", "notes"]
