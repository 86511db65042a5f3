"""One run of ``python -m training``, from its flags to its exit status."""

from __future__ import annotations

import argparse
import errno
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from training import seen_images
from training.allocator import is_out_of_memory
from training.checkpoint import DISK_FULL_ADVICE, CheckpointError, RecipeStage, RunConfig, digest, read_config
from training.cli import Beginning, choose_preset, find_beginning, read_run
from training.config import Preset, TrainConfig
from training.data.dataset import DataError, DataSet
from training.data.load import load_for
from training.distillation import check_teachers
from training.distributed import PeerFailed, World, join, shut_down
from training.network import count_parameters
from training.precision import choose_precision, computes_in_bfloat16, describe_precision
from training.recipe import Stage, check_flags
from training.recipe_run import RecipeRunConfig, read_recipe_run, write_recipe_run
from training.run_dir import check_outside_classes, check_unused, lock_run_dir
from training.train import Trainer
from training.transfer import check_compatible, find_checkpoint, read_origin
from training.warnings import warnings_for

# Below so many steps, a preset's batch is halved, but not below this size.
MIN_STEPS_PER_EPOCH, MIN_BATCH_SIZE = 4, 8

# What a write that fails says of a disk without room; it names no file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ENLARGES = (
    "images are read at {0} x {0} pixels and enlarged to {1} x {1}, which adds no detail: --input-size {1} reads "
    "them at that size."
)

DONE, FAILED, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 3, 130


def execute(args: argparse.Namespace, preset: Preset | None) -> int:
    """Do what the flags ask for; what goes wrong is said on stderr.

    Args:
        args: of `training.cli.build_parser`.
        preset: what to train; None to resume.

    Returns:
        The exit status.
    """
    return in_world(args, lambda world, deadline: status_or_error(lambda: start(args, preset, world, deadline)))


def execute_stages(args: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Train what is left of a recipe's stages, one after the other; returns the exit status."""
    return in_world(args, lambda world, deadline: run_stages(stages, world, deadline))


def in_world(args: argparse.Namespace, work: Callable[[World, float | None], int]) -> int:
    """Do ``work`` as one of the processes that train together, until the deadline (`time.monotonic`), if any."""
    deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes is not None else None
    try:
        world = join(args.device)
    except ValueError as error:
        return print_error(error, USER_ERROR)
    status = FAILED
    try:
        status = work(world, deadline)
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        shut_down(world, None if status in (DONE, STOPPED) else status)
    return status


def run_stages(stages: Sequence[Stage], world: World, deadline: float | None) -> int:
    """Train each stage that has not ended; returns the exit status of the last that was trained."""
    if (status := status_or_error(lambda: world.run_on_main(lambda: check_stages(stages)))) != DONE:
        return status
    for stage in stages:
        if (status := status_or_error(lambda stage=stage: run_stage(stage, world, deadline))) != DONE:
            return status
    return DONE


def run_stage(stage: Stage, world: World, deadline: float | None) -> int:
    """Begin a stage, or go on with it, unless it has ended; returns the exit status."""
    is_done, has_begun = world.run_on_main(lambda: look_at_stage(stage))
    if is_done:
        return DONE
    if world.is_main:
        print(stage.describe(), flush=True)
    if has_begun:
        return start(stage.resumed(), None, world, deadline)
    return start(stage.args, choose_preset(stage.args), world, deadline)


def check_stages(stages: Sequence[Stage]) -> int:
    """Raise ValueError where a stage can't be trained or taken as it is, or their folder is another run's."""
    folder = stages[0].folder.parent
    if (folder / "config.json").exists() and read_recipe_run(folder) is None:
        raise ValueError(f"--out {folder}: holds a run that is none of a recipe; name another folder.")
    runs = check_flags(stages)
    for stage in stages:
        is_done, has_begun = look_at_stage(stage)
        if not is_done and not has_begun:
            check_origins(stage, runs)
    return DONE


def check_origins(stage: Stage, runs: Mapping[Path, Beginning]) -> None:
    """Raise where a stage names no run, or begins with weights that are not those of its model.

    Args:
        stage: that has not begun.
        runs: what each stage is or will be, by its folder.
    """
    try:
        for path in stage.args.init or ():
            theirs = find_beginning(path, runs) or Beginning.of(read_run(path))
            check_compatible(path, theirs.model, runs[stage.folder].model)
        for path in stage.args.teacher or ():
            if find_beginning(path, runs) is None:
                read_run(path)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"stage {stage.number} of {stage.count}: {error}") from error


def look_at_stage(stage: Stage) -> tuple[bool, bool]:
    """Whether a stage has ended, and whether it can be resumed.

    Raises:
        ValueError: other flags trained it, or a stage that it began with is no longer the one that it was.
    """
    if stage.is_done or stage.has_begun:
        run = read_config(stage.folder)
        if run.stage is None or run.stage.line != stage.line:
            raise ValueError(f"{stage.folder}: was trained by other flags than the recipe's ({stage.line}).")
        known = {origin.checkpoint_sha256 for origin in run.origins}
        for earlier in stage.origins:
            best = earlier / "best.safetensors"
            # Of one that has ended, the weights may have been taken away to save room.
            if digest(best) not in known if best.is_file() else not (earlier / "report.json").is_file():
                raise ValueError(
                    f"{stage.folder}: began with another {earlier.name} than there is now; restore that one, or remove "
                    f"{stage.folder}, which is then trained again."
                )
    return stage.is_done, stage.has_begun


def status_or_error(work: Callable[[], int]) -> int:
    """The exit status of ``work``, with a sentence for what a user can put right."""
    try:
        return work()
    except (ValueError, DataError, CheckpointError) as error:
        return print_error(error, USER_ERROR)
    except PeerFailed:
        return USER_ERROR
    except MemoryError as error:
        return print_error(
            f"too little memory for the data ({error}): use fewer images or a lower --input-size.", USER_ERROR
        )
    except FloatingPointError as error:  # which all processes notice together
        return print_error(error, FAILED) if os.environ.get("RANK", "0") == "0" else FAILED
    except OSError as error:
        if error.errno in DISK_FULL:
            return print_error(f"{error.strerror}: {DISK_FULL_ADVICE}.", USER_ERROR)
        if error.filename is None:
            raise
        return print_error(f"{os.fsdecode(error.filename)}: {error.strerror}.", USER_ERROR)  # TensorBoard's are bytes


def print_error(problem: object, status: int) -> int:
    """Say what is wrong; returns ``status``."""
    print(f"error: {problem}", file=sys.stderr)
    return status


def start(args: argparse.Namespace, preset: Preset | None, world: World, deadline: float | None) -> int:
    """Prepare, train until the deadline (`time.monotonic`) at most, report; returns the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with ExitStack() as held:
        # Read once, and the same images and checkpoints for all, whatever is at their paths by then.
        run, data_set, folder = world.run_on_main(lambda: prepare(args, preset, world, held))
        with explain_out_of_memory(run.train, world.device, resumed=preset is None):
            trainer = Trainer(run, data_set, folder, world)
            if preset is None:
                trainer.resume()
            else:
                trainer.load_origins(*(list(map(find_checkpoint, paths or ())) for paths in (args.init, args.teacher)))
            if preset is not None and world.is_main:
                (folder / "config.json").write_text(run.model_dump_json(indent=2) + "\n", encoding="utf-8")
                seen_images.write(folder, data_set.train, origin_folders(args))
            if world.is_main:
                if args.stage is not None:
                    config = RecipeRunConfig(recipe=args.stage.recipe, stages=args.stage.lines)
                    write_recipe_run(folder.parent, config)
                warnings = (
                    f"warning: {warning}" for warning in warnings_for(run, data_set, preset, origin_folders(args))
                )
                if enlarges_only(args, run):
                    warnings = chain(
                        warnings, [f"warning: {ENLARGES.format(run.model.input_size, run.model.image_size)}"]
                    )
                asked = None if preset is None else preset.train.precision
                precision = describe_precision(run.train.precision, asked, world.device)
                print(describe(trainer), precision, *warnings, sep="\n", flush=True)
            with stop_by_signal(trainer):
                finished = trainer.fit(deadline, args.max_steps)
            if not world.is_main:
                return DONE if finished else STOPPED
            if not finished:
                again = resume_command(args, run, world, folder)
                print(f"stopped after step {trainer.state.step}; go on with: {again}")
                return STOPPED
            if not (is_last := run.stage is None or run.stage.number == run.stage.count):
                trainer.test_split = None  # which the last stage alone reads
            report = trainer.report()
    without = None if run.with_top5 else {"val": {"top5"}, "test": {"top5"}}
    shown = {"epoch", "temperature", "val", "test", "note"}
    print(report.model_dump_json(include=shown, exclude=without, indent=2))
    if not is_last:
        if args.stage is None:
            print(f"{folder} has ended; the same command with --recipe goes on with the stage after it")
        return DONE
    whole = folder if args.stage is None else folder.parent
    if args.stage is not None:
        print(f"curves of all stages are in {whole}")
    export = shell_command(["python", "-m", "export"], [str(whole), *data_flag(args, run), "--out", "models/NAME"])
    is_teacher = run.model.network == "residual"
    then = (
        f"it teaches with --distillation 0.7 --teacher {shlex.quote(str(whole))}" if is_teacher else f"export: {export}"
    )
    print(f"best checkpoint and report are in {folder}; {then}")
    return DONE


def enlarges_only(args: argparse.Namespace, run: RunConfig) -> bool:
    """Whether the flags ask for larger images than are read."""
    return args.image_size is not None and args.input_size is None and run.model.image_size > run.model.input_size


def origin_folders(args: argparse.Namespace) -> list[Path]:
    """The folders of the checkpoints that a run begins with and learns from."""
    return [find_checkpoint(path).parent for path in (*(args.init or ()), *(args.teacher or ()))]


def resume_command(args: argparse.Namespace, run: RunConfig, world: World, folder: Path) -> str:
    """What goes on with a run as it was begun: of other threads or devices the sums are others."""
    by_torchrun = dist.is_torchelastic_launched()
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={world.size}"] if by_torchrun else ["python"]
    if args.repeat is not None:
        return shell_command([*launcher, "-m", "training"], args.repeat)
    own = not by_torchrun and (args.processes or world.size > 1)
    where = ["--processes", str(world.size)] if own else []
    where += ["--threads", str(torch.get_num_threads())] if own or args.threads else []
    where += ["--device", args.device] if args.device != "auto" else []
    flags = ["--resume", str(folder), *data_flag(args, run), *where]
    return shell_command([*launcher, "-m", "training"], flags)


def shell_command(command: list[str], flags: list[str]) -> str:
    """A command as one types it: through make, where make has started this."""
    if os.environ.get("STARTED_BY_MAKE"):
        return f'make {"train" if command[-1] == "training" else command[-1]} ARGS="{shlex.join(flags)}"'
    return shlex.join([*command, *flags])


def data_flag(args: argparse.Namespace, run: RunConfig) -> list[str]:
    """``--data`` where the images are no longer where the run found them at its beginning."""
    return ["--data", str(args.data)] if args.data is not None and str(args.data) != run.data else []


def prepare(
    args: argparse.Namespace, preset: Preset | None, world: World, held: ExitStack
) -> tuple[RunConfig, DataSet, Path]:
    """Configuration, data and folder of the run that the flags ask for.

    Args:
        args: the flags.
        preset: what to train; None to resume.
        world: of the processes that share a batch.
        held: gets the folder's lock.

    Raises:
        ValueError, DataError, CheckpointError: a sentence for the user.
    """
    if preset is None:
        run, data_set = load_run(args)
        folder = args.resume
    else:
        world.share(preset.train.batch_size)
        inits = [read_origin(find_checkpoint(path)) for path in args.init or ()]
        for path, origin in zip(args.init or (), inits, strict=True):
            check_compatible(find_checkpoint(path), origin.run.model, preset.model)
            if origin.run.labels != inits[0].run.labels:
                raise CheckpointError(
                    f"{path}: tells other classes than {args.init[0]}; the mean of weights is of models of the same."
                )
        # Twice, because without --out the folder is named after data that has to be read first.
        check_unused(args.out)
        data_set = load_for(preset, args.data)
        # A recipe says it for data without val/, which others may have.
        if args.validation_fraction is not None and data_set.has_val and args.stage is None:
            raise ValueError(
                f"--validation-fraction {args.validation_fraction} changes nothing: {args.data} has its own val/."
            )
        folder = args.out or Path("runs") / f"{args.preset}-{data_set.name}"
        check_unused(folder)
        check_outside_classes(folder, data_set)
        precision = choose_precision(preset.train.precision, world.device)
        train = preset.train.model_copy(update={"precision": precision})
        if args.batch_size is None:
            train = train.model_copy(
                update={"batch_size": reduce_batch_size(train.batch_size, len(data_set.train), world)}
            )
        run = RunConfig(
            preset=args.preset,
            data=str(args.data) if args.data else None,
            dataset=data_set.name,
            labels=data_set.labels,
            superclasses=data_set.superclasses,
            superclass_names=data_set.superclass_names,
            model=preset.model.model_copy(update={"num_classes": len(data_set.labels)}),
            train=train,
            pictures_sha256=data_set.digest(),
            init=inits[0] if inits else None,
            averaged=tuple(inits[1:]),
            teachers=tuple(read_origin(find_checkpoint(path)) for path in args.teacher or ()),
            stage=None if args.stage is None else recipe_stage(args.stage),
        )
        check_teachers(run)
    held.enter_context(lock_run_dir(folder))
    return run, data_set, folder


def recipe_stage(stage: Stage) -> RecipeStage:
    """What a run remembers of its stage."""
    return RecipeStage(recipe=stage.recipe, line=stage.line, number=stage.number, count=stage.count)


def reduce_batch_size(batch_size: int, images: int, world: World) -> int:
    """Halve a preset's batch until an epoch has `MIN_STEPS_PER_EPOCH` steps, down to `MIN_BATCH_SIZE`.

    Args:
        batch_size: the preset's.
        images: how many there are to train on.
        world: its processes share the batch.
    """
    while (
        math.ceil(images / batch_size) < MIN_STEPS_PER_EPOCH
        and batch_size >= 2 * MIN_BATCH_SIZE
        and batch_size % (2 * world.size) == 0
    ):
        batch_size //= 2
    return batch_size


def load_run(args: argparse.Namespace) -> tuple[RunConfig, DataSet]:
    """Configuration and data of the run in a folder."""
    if read_recipe_run(args.resume) is not None:
        raise CheckpointError(
            f"--resume {args.resume}: holds the stages of a recipe; go on with the command that began it, --recipe "
            f"and --out {args.resume}."
        )
    run = read_config(args.resume)
    if not (args.resume / "last.safetensors").exists():
        if (ended := (args.resume / "report.json").exists()) or (args.resume / "best.safetensors").exists():
            raise CheckpointError(
                f"--resume {args.resume}: this run has {'ended' if ended else 'stopped'}, and its last.safetensors is "
                f"gone; export it, or start another with --init {args.resume}."
            )
        raise CheckpointError(
            f"--resume {args.resume}: this run ended before its first checkpoint; "
            f"start it again with --out {args.resume}"
            + (", and with the same --init or --teacher." if run.origins else ".")
        )
    data_set = load_for(run, args.data or (Path(run.data) if run.data else None))
    if data_set.labels != run.labels:
        raise DataError(
            f"the data now has other classes than when {args.resume} began; restore it, or start a new run."
        )
    if run.pictures_sha256 not in (None, data_set.digest()):
        raise DataError(
            f"the data now has other images than when {args.resume} began (or another Pillow decodes them "
            f"otherwise): restore it, or start a new run with --init {args.resume}."
        )
    return run, data_set


def describe(trainer: Trainer) -> str:
    """One line on what is about to be trained."""
    run, world = trainer.run, trainer.world
    size = run.model.input_size
    return (
        f"{run.preset}: {count_parameters(trainer.state.model):,} parameters, "
        f"{run.dataset}: {len(trainer.train_split):,} training and {len(trainer.val_split):,} validation images "
        f"of {len(run.labels)} classes, each of {size} x {size} pixels, {world.size} x {world.device.type}, "
        f"{trainer.steps_per_epoch} steps an epoch, run in {trainer.folder}"
    )


@contextmanager
def stop_by_signal(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal stop the run cleanly, and a second Ctrl-C at once.

    ``torchrun`` passes on a Ctrl-C that its processes get as well, so there every one counts as the first.
    """

    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def request_stop(signum: int, _frame: FrameType | None) -> None:
        trainer.stop_requested = True
        if signum == getattr(signal, "SIGHUP", None):  # the terminal is gone, and writing to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)
        if not dist.is_torchelastic_launched():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    asking = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # `nohup` has it ignored
        asking.append(signal.SIGHUP)
    previous = {number: signal.signal(number, request_stop) for number in asking}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def explain_out_of_memory(train: TrainConfig, device: torch.device, *, resumed: bool) -> Iterator[None]:
    """Turn what torch and numpy raise when memory runs out into a ValueError with a sentence for the user."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "start with a lower --batch-size"
        if train.precision != "bfloat16" and computes_in_bfloat16(device):
            advice += ", or with --precision bfloat16"
        if resumed:
            advice = f"free some, or {advice} and --init this run"
        raise ValueError(f"too little memory for a batch of {train.batch_size} images: {advice}.") from error
