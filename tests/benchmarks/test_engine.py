from pathlib import Path

import numpy as np
import pytest

from benchmarks.engine import Cell, label, locate, measure_in_turn, rows_of
from benchmarks.matmul import measure_gflops, measure_in_subprocess
from tests.fakes import FakeEngine, make_model_folder


def test_engines_are_measured_in_turn_and_each_begins_a_round() -> None:
    order: list[str] = []
    engines = []
    for name in ("a", "b"):
        engine = FakeEngine(max_batch_size=8)
        engine.fail = lambda numbers, name=name: order.append(name)  # type: ignore[misc]
        engines.append(engine)
    measured = dict(measure_in_turn(engines, [2, 8], seconds=0, rounds=3))
    one_batch_size = ["a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]  # each: one warm-up run, one counted
    assert order == one_batch_size * 2
    assert [len(batch) for batch in engines[0].batches] == [2] * 6 + [8] * 6
    assert {batch: [len(cell.wall) for cell in cells] for batch, cells in measured.items()} == {2: [3, 3], 8: [3, 3]}


def test_a_cell_measures_for_as_long_as_it_is_told() -> None:
    engine, cell = FakeEngine(), Cell()
    engine.delay = 0.005
    cell.measure(engine, np.zeros((1, 4, 6, 3), dtype=np.uint8), 0.03)
    assert sum(cell.wall[:-1]) < 0.03 <= sum(cell.wall) + 0.005
    assert min(cell.wall) >= 0.005
    assert len(engine.batches) == len(cell.wall) + 1


def test_rates_ratios_and_fractions() -> None:
    cells = [Cell([0.1, 0.2, 0.4], cpu=2.4), Cell([0.1, 0.1, 0.05], cpu=0.24)]
    first, second = rows_of(8, cells, ["a", "b"], [2.0, None], peak=320)
    assert (first["model"], first["batch"], first["runs"]) == ("a", 8, 3)
    assert first["ms_median"] == pytest.approx(200)
    assert first["ms_best"] == pytest.approx(100)
    assert first["images_per_s"] == pytest.approx(40)
    assert first["images_per_s_best"] == pytest.approx(80)
    assert first["cpu_ms_per_image"] == pytest.approx(100)
    assert first["fraction_of_matmul"] == pytest.approx(2 * 80 / 320)
    assert (first["speed_vs_first"], second["speed_vs_first"]) == (1, pytest.approx(2))
    assert second["fraction_of_matmul"] is None


def test_without_operations_there_is_no_fraction() -> None:
    assert "fraction_of_matmul" not in rows_of(1, [Cell([0.1])], ["a"], [None], peak=1)[0]


def test_files_and_folders_are_found(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "tiny", 1)
    file = make_model_folder(tmp_path / "tiny", 2) / "model.onnx"
    assert locate(tmp_path / "tiny", "cpu") == locate(tmp_path / "tiny" / "2", "cpu") == locate(file, "cpu") == file
    assert label(file) == "tiny/2/model.onnx"


def test_the_matrix_product_rate_is_measured() -> None:
    assert measure_gflops(64, 0) > 0
    assert measure_in_subprocess(threads=1, seconds=0, size=64) > 0
