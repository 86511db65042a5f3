from collections.abc import Callable
from pathlib import Path

import pytest

from service import engine as engine_module
from service.artifact import MODEL_FILES
from service.engine import OnnxEngine
from service.tuning import LEAST_ROUNDS, MOST_ROUNDS, fastest_size
from tests.fakes import make_model_folder, tiny_images

SIZES = (1, 2, 4, 8, 16, 32)


class Machine:
    """A clock, and runs that take as long as a formula says."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.runs: list[int] = []

    def run(self, size: int) -> None:
        self.runs.append(size)
        self.now += self.seconds(size)

    def fastest(self) -> int:
        return fastest_size(self.run, SIZES, clock=lambda: self.now)


def test_a_fixed_cost_of_each_run_wants_large_batches() -> None:
    assert Machine(lambda size: 0.001 + 0.0001 * size).fastest() == 32


def test_a_model_that_larger_batches_slow_down_runs_alone() -> None:
    assert Machine(lambda size: 0.010 * size**1.2).fastest() == 1


def test_the_ceiling_stays_when_others_are_hardly_faster() -> None:
    assert Machine(lambda size: 0.001 * size * (1.09 if size == 32 else 1.0)).fastest() == 32
    assert Machine(lambda size: 0.001 * size * (1.11 if size == 32 else 1.0)).fastest() == 16


def test_of_sizes_about_as_fast_as_the_fastest_the_largest() -> None:
    factors = {1: 1.5, 2: 1.03, 4: 1.0, 8: 1.09, 16: 1.11, 32: 1.2}
    assert Machine(lambda size: 0.001 * size * factors[size]).fastest() == 8


def test_a_disturbed_round_is_no_verdict() -> None:
    machine = Machine(lambda size: 0.001 + 0.0001 * size)
    plain = machine.seconds
    a_round = [size for size in SIZES for _ in range(32 // size)]
    machine.seconds = lambda size: plain(size) * (9 if 3 < len(machine.runs) <= 3 + len(a_round) else 1)
    assert machine.fastest() == 32
    assert machine.runs == [1] * LEAST_ROUNDS + a_round * MOST_ROUNDS


def test_work_beside_it_is_no_reason_for_small_batches() -> None:
    """Others take the processor for 10 ms of every 20: a run of 1 ms may slip through, one of 33 ms never does."""
    machine = Machine(lambda size: 0.001 * size)

    def run(size: int) -> None:
        machine.run(size)
        machine.now += 0.010 * (machine.now // 0.020 - (machine.now - machine.seconds(size)) // 0.020)

    assert fastest_size(run, SIZES, clock=lambda: machine.now) == 32


def test_sizes_that_take_too_long_are_not_tried() -> None:
    machine = Machine(lambda size: 0.060 * size)
    assert machine.fastest() == 4
    assert max(machine.runs) == 4


def test_a_picture_that_takes_too_long_runs_alone() -> None:
    machine = Machine(lambda size: 1.0 * size)
    assert machine.fastest() == 1
    assert machine.runs == [1] * 2 * LEAST_ROUNDS


@pytest.mark.parametrize(("tunes", "ceiling"), [(True, 4), (False, 8)])
def test_an_engine_lowers_its_ceiling_at_warm_up(
    tunes: bool, ceiling: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def fastest(run: Callable[[int], object], sizes: list[int]) -> int:
        asked.append(sizes)
        run(sizes[-1])
        return 4

    monkeypatch.setattr(engine_module, "fastest_size", fastest)
    folder = make_model_folder(tmp_path)
    path = next(folder.rglob(MODEL_FILES["float32"]))
    engine = OnnxEngine(path, provider="cpu", max_batch_size=8, intra_op_threads=1, tune_batch_size=tunes)
    engine.warm_up()
    assert engine.max_batch_size == ceiling
    assert asked == ([[1, 2, 4, 8]] if tunes else [])


def test_memory_that_runs_out_while_tuning_lowers_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(make_model_folder(tmp_path).rglob(MODEL_FILES["float32"]))
    engine = OnnxEngine(path, provider="cpu", max_batch_size=8, intra_op_threads=1, tune_batch_size=True)

    def fastest(run: Callable[[int], object], sizes: list[int]) -> int:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(engine_module, "fastest_size", fastest)
    engine.warm_up()
    assert engine.max_batch_size == 4
    assert len(engine.run(tiny_images(4))) == 4
