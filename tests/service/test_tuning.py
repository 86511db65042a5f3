from collections.abc import Callable
from pathlib import Path

import pytest

from service import engine as engine_module
from service.artifact import MODEL_FILES
from service.engine import OnnxEngine
from service.tuning import BUDGET_SECONDS, RUNS, fastest_size
from tests.fakes import make_model_folder

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
    machine = Machine(lambda size: 0.050 * size**1.05)
    assert machine.fastest() == 1
    assert max(machine.runs) == 4  # two sizes in a row gained nothing


def test_what_gains_less_than_three_percent_is_not_worth_the_wait() -> None:
    assert Machine(lambda size: 0.010 * size * (0.98 if size > 1 else 1.0)).fastest() == 1
    assert Machine(lambda size: 0.010 * size * (0.96 if size > 1 else 1.0)).fastest() == 2


def test_small_gains_that_add_up_are_worth_it() -> None:
    machine = Machine(lambda size: 0.0001 * size * 0.98 ** (size.bit_length() - 1))
    assert machine.fastest() == 16  # 2 % a doubling: 4 % from 1 to 4, and again to 16


def test_one_disturbed_run_of_a_size_is_no_verdict() -> None:
    machine = Machine(lambda size: 0.001 + 0.0001 * size)
    plain = machine.seconds
    machine.seconds = lambda size: plain(size) * (9 if len(machine.runs) % RUNS == 1 else 1)
    assert machine.fastest() == 32


def test_the_time_is_bounded() -> None:
    machine = Machine(lambda size: 1.0 + 0.001 * size)
    machine.fastest()
    assert machine.now <= BUDGET_SECONDS + RUNS * 1.01
    assert machine.runs == [1] * RUNS


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
