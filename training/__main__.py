"""``python -m training``: train a preset, or resume a run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch
from pydantic import ValidationError

from training import data
from training.checkpoint import CheckpointError, RunConfig
from training.cli import build_parser, choose_preset, overrides
from training.dataset import DataError
from training.distributed import World, join, leave
from training.model import count_parameters
from training.train import Trainer

STOPPED = 3  # exit status of a run that stopped before its end and can be resumed


def prepare(args: argparse.Namespace, world: World) -> tuple[RunConfig, data.DataSet, Path]:
    """Configuration, data and folder of the run that the flags ask for.

    Raises:
        ValueError, DataError, CheckpointError: a sentence for the user.
    """
    changes = overrides(args)
    if args.resume is not None:
        return resume_config(args, changes)
    name = args.preset or "compact"
    preset = choose_preset(name, changes)
    data_set = load_data(args.data, preset.model.input_size, world)
    folder = args.out or Path("runs") / f"{name}-{data_set.name}"
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run already: go on with it by --resume {folder}, or name another --out.")
    run = RunConfig(
        preset=name,
        data=str(args.data) if args.data else None,
        dataset=data_set.name,
        labels=data_set.labels,
        superclasses=data_set.superclasses,
        superclass_names=data_set.superclass_names,
        model=preset.model.model_copy(update={"num_classes": len(data_set.labels)}),
        train=preset.train,
    )
    return run, data_set, folder


def resume_config(args: argparse.Namespace, changes: dict[str, object]) -> tuple[RunConfig, data.DataSet, Path]:
    """What `prepare` gives, read from the folder of a run."""
    given = [*changes, *(name for name in ("preset", "out") if getattr(args, name) is not None)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--resume goes on with the run as it was configured; leave out {flags}, or start a new run.")
    path = args.resume / "config.json"
    try:
        run = RunConfig.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{args.resume} is no run: it has no config.json.") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is not of this version of the project: {error.errors()[0]['msg']}.") from error
    source = args.data or (Path(run.data) if run.data else None)
    data_set = data.load(source, input_size=run.model.input_size, seed=0)
    if data_set.labels != run.labels:
        raise DataError(
            f"the data now has other classes than when {args.resume} began; restore it, or start a new run."
        )
    return run, data_set, args.resume


def load_data(source: Path | None, input_size: int, world: World) -> data.DataSet:
    """Load the data set; of several processes the first downloads before the others look."""
    if not world.is_main:
        world.broadcast(None)
    loaded = data.load(source, input_size=input_size, seed=0)
    if world.is_main:
        world.broadcast(None)
    return loaded


def start(args: argparse.Namespace, world: World) -> int:
    """Run what the flags ask for; returns the exit status."""
    deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes is not None else None
    if args.threads:
        torch.set_num_threads(args.threads)
    run, data_set, folder = prepare(args, world)
    trainer = Trainer(run, data_set, folder, world)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(run.model_dump_json(indent=2) + "\n")
        print(describe(trainer), flush=True)
    if args.resume is not None:
        trainer.resume()
    previous = catch_interrupt(trainer)
    finished = trainer.fit(deadline, args.max_steps)
    signal.signal(signal.SIGINT, previous)
    if not world.is_main:
        return 0 if finished else STOPPED
    if not finished:
        print(f"stopped after step {trainer.step} (epoch {trainer.epoch + 1}); go on with --resume {folder}")
        return STOPPED
    report = trainer.report()
    print(json.dumps({key: report[key] for key in ("epoch", "temperature", "val", "test")}, indent=2))
    print(
        f"best checkpoint, curves and report in {folder}; export it with: python -m export {folder} --out models/NAME"
    )
    return 0


def catch_interrupt(trainer: Trainer) -> signal.Handlers:
    """Let the first Ctrl-C stop the run cleanly, and a second one at once."""

    def request_stop(_signum: int, _frame: FrameType | None) -> None:
        trainer.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return signal.signal(signal.SIGINT, request_stop)  # type: ignore[return-value]


def describe(trainer: Trainer) -> str:
    """One line on what is about to be trained."""
    run, world = trainer.run, trainer.world
    return (
        f"{run.preset}: {count_parameters(trainer.model):,} parameters, {run.dataset}: {len(trainer.train_split):,} training "
        f"and {len(trainer.val_split):,} validation pictures of {len(run.labels)} classes, {world.size} x {world.device.type}, "
        f"{trainer.steps_per_epoch} steps an epoch, run in {trainer.folder}"
    )


def memory_sentence(error: Exception, batch_size: int | None) -> str | None:
    """What to say when memory ran out; None when it was something else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
        return (
            f"too little memory for a batch of {batch_size or 'the preset'} pictures: lower --batch-size, or use "
            "--precision bfloat16."
        )
    return None


def main() -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 wrong usage, 3 stopped and resumable."""
    args = build_parser().parse_args()
    try:
        world = join(args.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return start(args, world)
    except (ValueError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        sentence = memory_sentence(error, args.batch_size)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    finally:
        leave(world)


if __name__ == "__main__":
    sys.exit(main())
