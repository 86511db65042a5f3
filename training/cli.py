"""The command line of ``python -m training``: one flag for each field of the configurations, over a preset."""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from training.config import PRESETS, ModelConfig, Preset, TrainConfig

Config = TypeVar("Config", bound=BaseModel)

# The data set decides this, nobody else.
NOT_FLAGS = {"num_classes"}


def build_parser() -> argparse.ArgumentParser:
    """The parser, with a group of flags for the run, the recipe and the model."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a Perceiver on CIFAR-100 or on a folder of your own pictures.",
        allow_abbrev=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help=f"model and recipe to start from: {', '.join(PRESETS)} (default: compact)")
    run.add_argument(
        "--data",
        type=Path,
        help="folder with cifar-100-python/, or with a folder of pictures for each class (optionally below train/, val/, "
        "test/); without it CIFAR-100 is downloaded to data/ once",
    )
    run.add_argument("--out", type=Path, help="folder of the run (default: runs/<preset>-<data set>)")
    run.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder, bit for bit")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    run.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's choice)")
    run.add_argument("--max-minutes", type=float, help="stop cleanly after so many minutes; --resume goes on")
    run.add_argument("--max-steps", type=int, help="stop cleanly after so many steps of the run; --resume goes on")
    _add_fields(parser.add_argument_group("recipe (default: the preset's)"), TrainConfig)
    _add_fields(parser.add_argument_group("model (default: the preset's)"), ModelConfig)
    return parser


def _add_fields(group: Any, model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if name in NOT_FLAGS:
            continue
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"default": None, "help": (field.description or "").replace("%", "%%")}
        kind = field.annotation
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, choices=get_args(kind), **options)
        else:
            if get_origin(kind) in (Union, types.UnionType):
                kind = get_args(kind)[0]
            group.add_argument(flag, type=kind, metavar=getattr(kind, "__name__", "VALUE").upper(), **options)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of recipe and model that were given."""
    names = (set(TrainConfig.model_fields) | set(ModelConfig.model_fields)) - NOT_FLAGS
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def choose_preset(name: str, changes: dict[str, Any]) -> Preset:
    """A preset with some fields changed.

    Raises:
        ValueError: no such preset, or values that don't fit; a sentence for the user.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: there is no such preset; there are {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    try:
        return Preset(model=_changed(preset.model, changes), train=_changed(preset.train, changes))
    except ValidationError as error:
        first = error.errors()[0]
        flag = "".join("--" + str(part).replace("_", "-") + ": " for part in first["loc"])
        raise ValueError(flag + first["msg"].removeprefix("Value error, ") + ".") from error


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    mine = {name: value for name, value in changes.items() if name in type(config).model_fields}
    return type(config).model_validate(config.model_dump() | mine)
