"""Images a second against batch size, through the serving code: `python -m benchmarks.engine MODEL [MODEL ...]`.

Several models are compared in turn within one run, in rounds, so that what else the machine does meets all of them.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import describe_run, find_model, print_run, report, run_command
from benchmarks.matmul import measure_in_subprocess
from service.engine.onnx_engine import Engine, OnnxEngine
from service.engine.session import EngineError, choose_file, resolve_provider

BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Cell:
    """All runs of one model at one batch size: wall and CPU seconds of each."""

    wall: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def measure(self, engine: Engine, images: NDArray[np.uint8], seconds: float) -> None:
        """Run uint8 [N, H, W, 3] until `seconds` are over, at least once, after one run that is not counted."""
        engine.run(images)
        cpu, end = time.process_time(), time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            engine.run(images)
            now = time.perf_counter()
            self.wall.append(now - start)
            if now >= end:
                break
        self.cpu += time.process_time() - cpu


def measure_in_turn(
    engines: Sequence[Engine], batches: Sequence[int], *, seconds: float, rounds: int
) -> Iterator[tuple[int, list[Cell]]]:
    """Measure every engine at every batch size; yield the batch size and one cell an engine.

    Args:
        engines: their models may be of different input sizes.
        batches: sizes, none above the engines' own limit.
        seconds: for each engine and batch size, over all rounds.
        rounds: an engine is measured so many times, and each round begins with another one.
    """
    rng = np.random.default_rng(0)
    for batch in batches:
        images = [rng.integers(0, 256, (batch, *engine.metadata.input_size, 3), dtype=np.uint8) for engine in engines]
        cells = [Cell() for _ in engines]
        for number in range(rounds):
            for step in range(len(engines)):
                index = (number + step) % len(engines)
                cells[index].measure(engines[index], images[index], seconds / rounds)
        yield batch, cells


def rows_of(
    batch: int, cells: Sequence[Cell], names: Sequence[str], gflop: Sequence[float | None], peak: float
) -> list[dict[str, object]]:
    """Reduce the cells of a batch size to one row a model.

    Args:
        gflop: 10^9 operations an image of each model; None: unknown.
        peak: the machine's rate, 10^9 operations a second.
    """
    rows: list[dict[str, object]] = []
    first = median(cells[0].wall)
    for name, cell, operations in zip(names, cells, gflop, strict=True):
        middle, best = median(cell.wall), min(cell.wall)
        row: dict[str, object] = {
            "model": name,
            "batch": batch,
            "runs": len(cell.wall),
            "ms_median": middle * 1e3,
            "ms_best": best * 1e3,
            "images_per_s": batch / middle,
            "images_per_s_best": batch / best,
            "cpu_ms_per_image": cell.cpu * 1e3 / (batch * len(cell.wall)),
            "speed_vs_first": first / middle,
        }
        if any(gflop):
            row["fraction_of_matmul"] = None if operations is None else operations * batch / best / peak
        rows.append(row)
    return rows


def locate(path: Path, provider: str) -> Path:
    """Return the file itself, or the one that the service would take of a folder on this provider."""
    if path.is_file():
        return path
    return choose_file(find_model(path).path, resolve_provider(provider))  # type: ignore[arg-type]


def label(path: Path) -> str:
    """Name a model file by its last three parts: model, version, file."""
    return "/".join(path.resolve().parts[-3:])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="model folders, version folders or .onnx files")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run; 0: onnxruntime's choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model and batch size")
    parser.add_argument("--rounds", type=int, default=5, help="turns into which these are split")
    parser.add_argument(
        "--gflop", type=float, nargs="+", default=[], help="10^9 operations an image, of each model or of all"
    )
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    args = parser.parse_args()
    if len(args.gflop) not in (0, 1, len(args.models)):
        parser.error(f"--gflop: give one number, or one for each of the {len(args.models)} models")
    if min(args.batches) < 1 or args.rounds < 1:
        parser.error("--batches and --rounds must be at least 1")
    return args


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    files = [locate(path, args.provider) for path in args.models]
    about = describe_run()
    engines = [
        OnnxEngine(file, provider=args.provider, max_batch_size=max(args.batches), intra_op_threads=args.threads)
        for file in files
    ]
    peak = measure_in_subprocess(args.threads)
    about["provider"] = f"{engines[0].provider}, threads {args.threads or 'as onnxruntime chooses'}"
    about["matrix product"] = f"{peak:.0f} GFLOP/s (NumPy, float32, on the CPU; best of a second)"
    about["method"] = f"{args.seconds:g} s each in {args.rounds} rounds in turn; random images; fraction: of best run"
    print_run(about)
    for engine in engines:
        engine.warm_up()
    gflop = (args.gflop * len(files))[: len(files)] or [None] * len(files)
    rows: list[dict[str, object]] = []
    for batch, cells in measure_in_turn(engines, args.batches, seconds=args.seconds, rounds=args.rounds):
        rows += rows_of(batch, cells, [label(file) for file in files], gflop, peak)
    report(rows, about, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main, EngineError)
