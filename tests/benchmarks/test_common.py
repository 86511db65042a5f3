import csv
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import BenchmarkError, describe_run, find_model, format_cell, format_table, write_csv


def test_a_run_says_where_it_was_made() -> None:
    about = describe_run()
    assert {"machine", "system", "load", "versions", "commit", "date", "command"} <= set(about)
    assert "numpy" in about["versions"]
    assert about["command"].startswith("python ")


def test_csv_files_carry_their_origin_and_read_back(tmp_path: Path) -> None:
    rows = [{"batch": 1, "ms": 0.25, "note": "a, b"}, {"batch": 2, "ms": None, "note": ""}]
    path = write_csv(tmp_path / "deep" / "x.csv", rows, {"machine": "m", "command": "c --x"})
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# machine: m", "# command: c --x"]
    assert list(csv.DictReader(lines[2:])) == [
        {"batch": "1", "ms": "0.25", "note": "a, b"},
        {"batch": "2", "ms": "", "note": ""},
    ]


def test_a_bare_name_goes_to_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    assert write_csv(Path("x.csv"), [{"a": 1}], {}) == tmp_path / "results" / "x.csv"
    monkeypatch.chdir(tmp_path)
    assert write_csv(Path("other/x.csv"), [{"a": 1}], {}) == Path("other/x.csv")


def test_tables_align_numbers_to_the_right_and_text_to_the_left() -> None:
    table = format_table([{"name": "a", "rate": 1234.5, "n": 7}, {"name": "long", "rate": 0.012345, "n": 10}])
    assert table.splitlines() == [
        "name     rate   n",
        "a        1234   7",
        "long  0.01235  10",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (12345.6, "12346"), (0.5, "0.5"), (3, "3"), ("x", "x"), (1.23456, "1.235")]
)
def test_cells(value: object, text: str) -> None:
    assert format_cell(value) == text


def test_a_model_is_found_by_its_folder_or_its_version(tmp_path: Path) -> None:
    for version in ("2", "10"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "model.onnx").touch()
    assert find_model(tmp_path).version == 10
    place = find_model(tmp_path / "2")
    assert (place.folder, place.version, place.path) == (tmp_path, 2, tmp_path / "2")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BenchmarkError, match="must be a model folder"):
            find_model(path)
