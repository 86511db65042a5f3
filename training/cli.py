"""The command line of ``python -m training``: one flag for each field of the configurations, over a preset.

Imports no torch: what is wrong with the flags is said at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from training.config import OF_RESIDUAL_NETWORK, PRESETS, ModelConfig, Preset, TrainConfig

if TYPE_CHECKING:
    from training.checkpoint import RunConfig
    from training.recipe import Stage

Config = TypeVar("Config", bound=BaseModel)

DEFAULT_PRESET = "compact"

# The data set decides this, nobody else.
NOT_FLAGS = {"num_classes"}

# Fields that say something only beside others: when each is used, and what to say of one that is given and is not.
USED_ONLY: dict[str, tuple[Callable[[Preset], bool], str]] = {
    "adamw_learning_rate": (lambda preset: preset.train.optimizer == "muon", "without --optimizer muon"),
    "warmup_epochs": (lambda preset: preset.train.schedule != "plateau", "with --schedule plateau"),
    **dict.fromkeys(
        ("plateau_factor", "plateau_patience", "plateau_threshold"),
        (lambda preset: preset.train.schedule == "plateau", "without --schedule plateau"),
    ),
    "mix_probability": (lambda preset: preset.train.mixup + preset.train.cutmix > 0, "without --mixup or --cutmix"),
    **dict.fromkeys(("mixup", "cutmix"), (lambda preset: preset.train.mix_probability > 0, "with --mix-probability 0")),
    "decay_all": (lambda preset: preset.train.weight_decay > 0, "with --weight-decay 0"),
    "label_smoothing": (lambda preset: preset.train.distillation < 1, "with --distillation 1"),
    **dict.fromkeys(
        ("distillation_temperature", "teachers_per_image"),
        (lambda preset: preset.train.distillation > 0, "without --distillation"),
    ),
    "fourier_bands": (lambda preset: preset.model.position != "learned", "with --position learned"),
    "sharing": (lambda preset: preset.model.num_iterations > 1, "with --num-iterations 1"),
    **dict.fromkeys(
        ("self_heads", "self_head_dim", "attention_fans", "drop_path"),
        (lambda preset: preset.model.num_blocks > 0, "with --num-blocks 0"),
    ),
}

USAGE = """python -m training [--preset NAME] [--data DIR] [--out RUN] [flags]
       python -m training [--recipe FILE] [--out RUN]                 (stage after stage)
       python -m training --resume RUN
       torchrun --standalone --nproc-per-node N -m training ...            (on N GPUs)"""

EPILOG = """Exit status: 0 done; 1 failed; 2 something you can put right, said in a sentence; 3 stopped before the end
by Ctrl-C, SIGTERM, --max-minutes or --max-steps, with a checkpoint to --resume from; 130 interrupted at once. torchrun
makes 1 of all but 0, and calls a stop a failure: look for the line "stopped after step"."""


def positive_int(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return number


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The parser, with a group of flags for the run, the recipe and the model."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        usage=USAGE,
        description="Train a Perceiver on CIFAR-100 or on a folder of your own images.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.set_defaults(stage=None, repeat=None)  # of `training.recipe`
    _add_run(parser.add_argument_group("run"))
    _add_fields(parser.add_argument_group("recipe (default: the preset's)"), TrainConfig)
    _add_fields(parser.add_argument_group("model (default: that of --init, else the preset's)"), ModelConfig)
    return parser


def _add_run(group: Any) -> None:
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"model and recipe to start from: {', '.join(PRESETS)} (default: {DEFAULT_PRESET}); with --init the "
        "recipe alone (default: the preset of that run)",
    )
    group.add_argument(
        "--recipe",
        metavar="FILE",
        help="train the stages of a recipe one after the other, each beginning with the one before it unless it names "
        "--init or a --preset: a file, or the "
        "name of a shipped one (default, where no flag says what to train: that of the shipped model). The same "
        "command again goes on where it was. Flags of recipe and model hold for every stage",
    )
    group.add_argument("--stages", action="store_true", help="show the recipe's stages, and train nothing")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with cifar-100-python/, or with a folder of images for each class (optionally below train/, "
        "val/, test/); without it CIFAR-100 is downloaded to data/ once",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="folder of the run (default: runs/<preset>-<data set>); of a recipe, in which each stage has its own "
        "(default: runs/<recipe>)",
    )
    group.add_argument(
        "--init",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="begin with the weights of a run, of a model folder or of a .safetensors file, not with random ones; of "
        "several, with their mean, which --epochs 0 reports as it is. The model is the first one, but for flags that "
        "are given: its patches, and latents on a grid, may stand closer or wider, its blocks may be more. Other "
        "classes get a fresh head",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="with --distillation: models of any size and the same classes, named as for --init, whose answers, in the "
        "mean, become part of the targets (default: the model of --init)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in this folder as it was configured; a run that has ended is measured "
        "again, and its report written anew",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="INT",
        help="CPU threads of each process (default: torch's choice, shared out). Without --processes: of one process",
    )
    group.add_argument(
        "--processes",
        type=positive_int,
        metavar="INT",
        help="processes that share each batch on a CPU (default: as many as torch takes threads, but no more than one "
        "for 64 images of a batch). Several of one thread train faster than one of several threads, and sum in another "
        "order",
    )
    group.add_argument(
        "--max-minutes",
        type=positive_float,
        metavar="FLOAT",
        help="stop cleanly after so many minutes; --resume goes on",
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        metavar="INT",
        help="stop cleanly after so many steps of the whole run; --resume goes on",
    )


def _add_fields(group: Any, model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if name in NOT_FLAGS:
            continue
        flag = _flag(name)
        options: dict[str, Any] = {"default": None, "help": (field.description or "").replace("%", "%%")}
        kind = field.annotation
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, choices=get_args(kind), **options)
        else:
            group.add_argument(flag, type=kind, metavar=getattr(kind, "__name__", "VALUE").upper(), **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def format_flag(name: str, value: object) -> str:
    """A field of the configurations as it is set on the command line."""
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    return f"{_flag(name)} {value}"


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of recipe and model that were given."""
    names = (set(TrainConfig.model_fields) | set(ModelConfig.model_fields)) - NOT_FLAGS
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def read_run(path: Path) -> RunConfig:
    """The configuration of the run whose weights a path means, those of `--init`.

    Raises:
        ValueError: there are none; a sentence for the user.
    """
    # Torch takes seconds to import, and most commands whose flags are wrong name no --init.
    from training import checkpoint, transfer

    try:
        return checkpoint.load(transfer.find_checkpoint(path))[1].run
    except checkpoint.CheckpointError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Beginning:
    """What a run gives to one that begins with its weights: the name of its preset, and its model."""

    preset: str
    model: ModelConfig

    @classmethod
    def of(cls, run: RunConfig) -> Self:
        """That of a run."""
        return cls(run.preset, run.model)


def find_beginning(path: Path, earlier: Mapping[Path, Beginning]) -> Beginning | None:
    """That of the run which a path means, its folder or a file there; None where it is none of ``earlier``."""
    return earlier.get(path) or earlier.get(path.parent)


def batch_sizes(args: argparse.Namespace, preset: Preset | None, stages: Sequence[Stage] | None) -> list[int]:
    """Images a step of what is to be trained, stage by stage, as flags or presets have it before data are seen."""
    if stages is not None:
        own = (stage.args for stage in stages)
        return [each.batch_size or PRESETS.get(each.preset, PRESETS[DEFAULT_PRESET]).train.batch_size for each in own]
    if preset is not None:
        return [preset.train.batch_size]
    try:
        return [int(json.loads((args.resume / "config.json").read_bytes())["train"]["batch_size"])]
    except (OSError, ValueError, KeyError, TypeError):
        return [1]  # no run, which is told later


def choose_preset(args: argparse.Namespace, earlier: Mapping[Path, Beginning] | None = None) -> Preset | None:
    """The preset with the changes that the flags ask for; None where a run is resumed. Sets `args.preset`, if unset.

    Args:
        args: the flags.
        earlier: what runs that `--init` may name will be, where they have not been trained yet.

    Raises:
        ValueError: no such preset, or values that don't fit; a sentence for the user.
    """
    changes = overrides(args)
    if args.resume is not None:
        _refuse([*changes, *(name for name in ("preset", "out", "init", "teacher") if getattr(args, name) is not None)])
        return None
    if args.preset not in (None, *PRESETS):
        raise ValueError(f"--preset {args.preset}: there is no such preset; there are {', '.join(PRESETS)}.")
    if args.init is not None and "latent_std" in changes:
        raise ValueError(f"--latent-std {changes['latent_std']} changes nothing with --init, which has latents.")
    init = None
    if args.init is not None:
        init = find_beginning(args.init[0], earlier or {}) or Beginning.of(read_run(args.init[0]))
    if args.preset is None:
        args.preset = init.preset if init is not None and init.preset in PRESETS else DEFAULT_PRESET
    preset = PRESETS[args.preset]
    if init is not None:
        preset = preset.model_copy(update={"model": init.model})
    _check_network(args, preset.model.network, changes)
    try:
        chosen = Preset(model=changed(preset.model, changes), train=changed(preset.train, changes))
    except ValidationError as error:
        first = error.errors()[0]
        flag = "".join(f"{_flag(str(part))} {first['input']}: " for part in first["loc"])
        raise ValueError(flag + first["msg"].removeprefix("Value error, ") + ".") from error
    if chosen.train.distillation and args.init is None and args.teacher is None:
        raise ValueError(
            f"--distillation {chosen.train.distillation} takes its targets from another model: name one with "
            "--teacher, or with --init."
        )
    if chosen.train.epochs == 0 and args.init is None:
        raise ValueError("--epochs 0 trains nothing: name the weights that are reported with --init, or more epochs.")
    if chosen.model.network == "residual" and args.init is not None and len(args.init) > 1:
        raise ValueError("--init takes one residual network: the mean of several would need its norms measured anew.")
    if args.teacher is not None and not chosen.train.distillation:
        named = " ".join(map(str, args.teacher))
        raise ValueError(f"--teacher {named} teaches nothing without --distillation: give both, or neither.")
    for name, (is_used, lacking) in USED_ONLY.items():
        if name in changes and not is_used(chosen):
            raise ValueError(f"{format_flag(name, changes[name])} changes nothing {lacking}.")
    if chosen.model.input_size > chosen.model.image_size:
        raise ValueError(
            f"--input-size {chosen.model.input_size} would be shrunk again, without filtering, to --image-size "
            f"{chosen.model.image_size}, which the model sees: give both, or neither."
        )
    return chosen


def _check_network(args: argparse.Namespace, network: str, changes: dict[str, Any]) -> None:
    """Raise ValueError where flags of the model are of another network than that of the preset, or of --init."""
    asked = changes.get("network", network)
    if args.init is not None and asked != network:
        raise ValueError(f"--network {asked}: the model of --init is a {network} network; leave the flag out.")
    foreign = [name for name in changes if name in ModelConfig.model_fields and name not in OF_RESIDUAL_NETWORK]
    if asked == "residual" and foreign:
        flags = ", ".join(map(_flag, foreign))
        raise ValueError(f"a residual network has no use for {flags}: leave it out, or train another preset.")


def _refuse(given: list[str]) -> None:
    if given:
        flags = ", ".join(map(_flag, given))
        raise ValueError(f"--resume goes on with the run as it was configured; leave out {flags}, or start a new run.")


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A configuration with those of the changes that are its fields."""
    mine = {name: value for name, value in changes.items() if name in type(config).model_fields}
    return type(config).model_validate(config.model_dump() | mine)
