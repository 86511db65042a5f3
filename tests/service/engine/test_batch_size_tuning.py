import math
import mmap
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.engine import onnx_engine as engine_module
from service.engine.batch_size_tuning import MAX_ROUNDS, MIN_ROUNDS, fastest_size
from service.engine.metadata import INPUT_NAME, MODEL_FILES, OUTPUT_NAME
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import HostRunner, Images, Logits
from service.engine.session import SessionSpec, open_session
from tests.fakes import make_model_folder, tiny_images

SIZES = (1, 2, 4, 8, 16, 32)


class Machine:
    """A clock, and runs whose times follow a formula."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.runs: list[int] = []

    def run(self, size: int) -> None:
        self.runs.append(size)
        self.now += self.seconds(size)

    def fastest(self) -> int:
        return fastest_size(self.run, SIZES, clock=lambda: self.now, wall_clock=lambda: 0.0)


def test_a_fixed_cost_of_each_run_wants_large_batches() -> None:
    assert Machine(lambda size: 0.001 + 0.0001 * size).fastest() == 32


def test_a_model_that_larger_batches_slow_down_runs_alone() -> None:
    assert Machine(lambda size: 0.010 * size**1.2).fastest() == 1


def test_the_ceiling_stays_when_others_are_hardly_faster() -> None:
    assert Machine(lambda size: 0.001 * size * (1.04 if size == 32 else 1.0)).fastest() == 32
    assert Machine(lambda size: 0.001 * size * (1.06 if size == 32 else 1.0)).fastest() == 16


def test_of_sizes_about_as_fast_as_the_fastest_the_largest() -> None:
    factors = {1: 1.5, 2: 1.03, 4: 1.0, 8: 1.04, 16: 1.06, 32: 1.2}
    assert Machine(lambda size: 0.001 * size * factors[size]).fastest() == 8


def test_a_disturbed_round_is_no_verdict() -> None:
    machine = Machine(lambda size: 0.001 + 0.0001 * size)
    plain = machine.seconds
    a_round = [size for size in SIZES for _ in range(32 // size)]
    machine.seconds = lambda size: plain(size) * (9 if 12 < len(machine.runs) <= 12 + len(a_round) else 1)
    assert machine.fastest() == 32
    turns = [size for number in range(MAX_ROUNDS) for size in a_round[:: 1 if number % 2 else -1]]
    assert machine.runs == [1] * (1 + MIN_ROUNDS) + [32, 16, 8, 4, 2] + turns


def test_work_beside_it_is_no_reason_for_small_batches() -> None:
    """Others take the processor for 10 ms of every 20: a run of 1 ms may slip through, one of 33 ms never does.

    The thread's clock would not see it; where it does, one size is taken for the next at most.
    """
    machine = Machine(lambda size: 0.001 * size)

    def run(size: int) -> None:
        machine.run(size)
        machine.now += 0.010 * (machine.now // 0.020 - (machine.now - machine.seconds(size)) // 0.020)

    assert fastest_size(run, SIZES, clock=lambda: machine.now, wall_clock=lambda: machine.now) >= 16


def test_the_time_of_other_programs_is_none_of_a_run() -> None:
    """With the processor for a tenth of the time, what would take 3 ms a run takes 30 ms; sizes above 3 would fall."""
    machine = Machine(lambda size: 0.0001 + 0.003 * size)
    wall_clock = (10 * machine.now for _ in count())
    assert fastest_size(machine.run, SIZES, clock=lambda: machine.now, wall_clock=lambda: next(wall_clock)) == 32


class NoisyMachine(Machine):
    """Load that comes and goes, up to four times the work, and 20 pauses of 5 ms a second."""

    def __init__(self, best: int, seed: int) -> None:
        super().__init__(self.noisy)
        self.best, self.random = best, Random(seed)
        self.period, self.phase = self.random.uniform(0.05, 3), self.random.uniform(0, 10)

    def noisy(self, size: int) -> float:
        true = 0.0001 * size * (1 + 0.15 * abs(math.log2(size / self.best)))
        load = 2.5 + 1.5 * math.sin(self.phase + self.now / self.period)
        pauses = sum(self.random.random() < 2 * true for _ in range(10))
        return true * load * self.random.uniform(0.97, 1.03) + 0.005 * pauses


@pytest.mark.parametrize("best", SIZES)
def test_no_noise_decides(best: int) -> None:
    chosen = [NoisyMachine(best, seed).fastest() for seed in range(30)]
    assert all(abs(math.log2(size / best)) <= 1 for size in chosen), chosen
    assert chosen.count(best) >= 20, chosen


def test_a_ceiling_above_which_nothing_may_run_is_not_run_to_warm_up(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path)
    ran: list[int] = []
    runner = engine._open_runner()
    run = runner.run

    def slow(images: Images) -> Logits:
        ran.append(len(images))
        begun = time.thread_time()
        while time.thread_time() < begun + 0.03 * len(images):
            pass
        return run(images)

    runner.run = slow  # type: ignore[method-assign]
    engine.warm_up()
    assert engine.max_batch_size in (1, 2)
    assert max(ran) == 2


def test_sizes_that_take_too_long_are_not_tried() -> None:
    machine = Machine(lambda size: 0.024 * size)
    assert machine.fastest() == 4
    assert max(machine.runs) == 4


def test_an_image_that_takes_too_long_runs_alone() -> None:
    machine = Machine(lambda size: 1.0 * size)
    assert machine.fastest() == 1
    assert machine.runs == [1] * (1 + MIN_ROUNDS)


def tiny_engine(folder: Path, *, tunes: bool = True) -> OnnxEngine:
    """A real engine for batches of up to 8."""
    path = next(make_model_folder(folder).rglob(MODEL_FILES["float32"]))
    return OnnxEngine(path, provider="cpu", max_batch_size=8, intra_op_threads=1, tune_batch_size=tunes)


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
    engine = tiny_engine(tmp_path, tunes=tunes)
    engine.warm_up()
    assert engine.max_batch_size == ceiling
    assert asked == ([[1, 2, 4, 8]] if tunes else [])


def test_memory_that_runs_out_while_tuning_lowers_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tmp_path)

    def fastest(run: Callable[[int], object], sizes: list[int]) -> int:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(engine_module, "fastest_size", fastest)
    engine.warm_up()
    assert engine.max_batch_size == 4
    assert len(engine.run(tiny_images(4))) == 4


@pytest.mark.parametrize(("fastest", "trims"), [(4, True), (8, False)])
def test_the_arenas_memory_of_larger_batches_is_freed(
    fastest: int, trims: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    trim = HostRunner.trim

    def recorded(runner: HostRunner, images: Images) -> None:
        trimmed.append(len(images))
        trim(runner, images)

    monkeypatch.setattr(engine_module, "fastest_size", lambda run, sizes: fastest)
    monkeypatch.setattr(HostRunner, "trim", recorded)
    engine = tiny_engine(tmp_path)
    engine.warm_up()
    assert trimmed == [1] * trims
    assert len(engine.run(tiny_images(fastest))) == fastest


def test_an_engine_that_can_not_be_trimmed_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trim(runner: HostRunner, images: Images) -> None:
        raise RuntimeError("Did not find an arena based allocator registered for device-id combination cpu:0")

    monkeypatch.setattr(engine_module, "fastest_size", lambda run, sizes: 4)
    monkeypatch.setattr(HostRunner, "trim", trim)
    engine = tiny_engine(tmp_path)
    engine.warm_up()
    assert engine.max_batch_size == 4
    assert len(engine.run(tiny_images(4))) == 4


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_trimming_frees_memory(tmp_path: Path) -> None:
    """A model of two products over 1 MiB of intermediates an image: what a run has taken is kept, and then is not."""
    batch = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch", 4])
    logits = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", 1])
    wide = numpy_helper.from_array(np.ones((4, 1 << 18), dtype=np.float32), "wide")
    narrow = numpy_helper.from_array(np.ones((1 << 18, 1), dtype=np.float32), "narrow")
    nodes = [
        helper.make_node("Cast", [INPUT_NAME], ["float"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["float", "wide"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "narrow"], [OUTPUT_NAME]),
    ]
    graph = helper.make_graph(nodes, "wide", [batch], [logits], [wide, narrow])
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    runner = HostRunner(open_session(path, SessionSpec("cpu", intra_op_threads=1)), 128)
    runner.run(np.zeros((128, 4), dtype=np.uint8))  # 128 MiB
    kept = resident_bytes()
    runner.trim(np.zeros((1, 4), dtype=np.uint8))
    assert kept - resident_bytes() > 100 * 2**20


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
