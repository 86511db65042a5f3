"""Images a second of a training step, and the fraction of the machine's matrix-product rate that it reaches.

    python -m benchmarks.training_speed compact reference --seconds 20
    torchrun --standalone --nproc-per-node 2 -m benchmarks.training_speed compact --threads 1

A step is a real one of `training.train`: augmentation, forward, backward, optimiser, with the preset's recipe, on noise
images of the right size. Operations are counted by torch's FlopCounterMode, forward and backward, two a multiply-add.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import BenchmarkError, describe_run, print_run, report, run_command
from training.checkpoint import RunConfig
from training.config import PRESETS, Precision
from training.data.dataset import DataSet, Split
from training.distributed import World, join, shut_down
from training.precision import choose_precision
from training.train import Trainer

# Sizes of the matrix products, until one takes this long. A processor that emulates bfloat16 needs 0.1 s for the first
# and minutes for the last, which no signal interrupts.
MATRICES, LONG_PRODUCT_S = (512, 1024, 2048, 4096), 0.05


def main() -> int:
    """Measure the presets that the command line names, in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), help=f"of {', '.join(PRESETS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=20, help="time for each preset after warm-up (default: 20)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the preset's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's choice)")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: the preset's")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    parser.add_argument("--csv", type=Path, help="file in benchmarks/results/, or a path")
    args = parser.parse_args()
    unknown = [name for name in args.presets if name not in PRESETS]
    if unknown:
        raise BenchmarkError(f"there is no preset {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    about = describe_run() | {"torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads"}
    try:
        world = join(args.device)
    except ValueError as error:
        raise BenchmarkError(str(error)) from error
    try:
        if world.is_main:
            print_run(about)
        rows = []
        for name in args.presets:
            rows.append(measure(name, args, world))
            if world.is_main:  # the next may take minutes, or fail
                print(f"{name}: {rows[-1]['images/s, median']:.4g} images a second", flush=True)
        if world.is_main:
            report(rows, about, args.csv)
    finally:
        shut_down(world)
    return 0


def measure(preset: str, args: argparse.Namespace, world: World) -> dict[str, object]:
    """Train a preset on noise for a while and say how fast that was."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(preset, args, Path(folder), world)
        except ValueError as error:  # the processes can't share the batch
            raise BenchmarkError(str(error)) from error
        batch = trainer.config.batch_size
        indices = torch.arange(batch, device=world.device)
        trainer.state.model.train()
        # Compiled, a batch that is mixed and one that is not are two programs, and the first may come twelve times.
        for _ in range(16 if trainer.config.compile else 3):
            trainer.one_step(indices)
        seconds = time_steps(trainer, indices, args.seconds)
    precision, compiled = trainer.config.precision, trainer.config.compile
    del trainer  # another one counts the operations
    rate = matrix_rate(world.device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    # All processes multiply at the same time, as they train.
    peak = world.size * world.mean(torch.tensor(rate, device=world.device)).item()
    gflop = count_operations(preset, args, world) / (batch // world.size) / 1e9
    best = batch / min(seconds)
    return {
        "preset": preset,
        "device": world.device.type,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "compiled": str(compiled),
        "batch": batch,
        "steps": len(seconds),
        "images/s, median": batch / sorted(seconds)[len(seconds) // 2],
        "images/s, best": best,
        "GFLOP/image": gflop,
        "matrix product GFLOP/s": peak,
        "fraction of it, best": best * gflop / peak,
    }


def count_operations(preset: str, args: argparse.Namespace, world: World) -> int:
    """Operations of one process's step. It is not compiled for this: torch counts what it dispatches itself."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(preset, args, Path(folder), world, compile=False)
        trainer.state.model.train()
        with FlopCounterMode(display=False) as counter:
            trainer.one_step(torch.arange(trainer.config.batch_size, device=world.device))
    return counter.get_total_flops()


def make_trainer(preset: str, args: argparse.Namespace, folder: Path, world: World, **changed: bool) -> Trainer:
    """A trainer of the preset on one batch of noise, with what the command line and the caller change."""
    chosen = PRESETS[preset]
    asked = {"batch_size": args.batch_size, "precision": args.precision, "compile": args.compile or None}
    changes = asked | changed
    train = chosen.train.model_copy(update={key: value for key, value in changes.items() if value is not None})
    train = train.model_copy(update={"precision": choose_precision(train.precision, world.device)})
    size, count = chosen.model.input_size, train.batch_size
    split = Split(
        torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8),
        torch.randint(0, chosen.model.num_classes, (count,)),
    )
    labels = tuple(map(str, range(chosen.model.num_classes)))
    run = RunConfig(preset=preset, data=None, dataset="noise", labels=labels, model=chosen.model, train=train)
    return Trainer(run, DataSet("noise", labels, split, split, None), folder, world)


def time_steps(trainer: Trainer, indices: torch.Tensor, budget: float) -> list[float]:
    """Seconds of each step, at least three, until the budget is spent in every process."""
    seconds: list[float] = []
    while len(seconds) < 3 or trainer.world.any(sum(seconds) < budget):
        start = time.perf_counter()
        trainer.one_step(indices)
        synchronize(trainer.world.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 8) -> float:
    """GFLOP/s of square matrix products: the best size, each with the best of some rounds."""
    best = 0.0
    for size in MATRICES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(time_product(a, b) for _ in range(rounds))
        best = max(best, 2 * size**3 / seconds / 1e9)
        if seconds > LONG_PRODUCT_S:
            break
    return best


def time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one matrix product, [n, n] by [n, n]."""
    synchronize(a.device)
    start = time.perf_counter()
    a @ b
    synchronize(a.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_command(main)
