"""Recipes: the stages of a training, each a line of flags, as TOML files. Imports no torch."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.cli import DEFAULT_PRESET, Beginning, build_parser, changed, choose_preset, overrides
from training.config import PRESETS

if TYPE_CHECKING:
    from training.checkpoint import RunConfig

SHIPPED = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "version-12"  # what made the shipped model

# What belongs to the machine or to the run as a whole, and is given beside --recipe.
OF_THE_WHOLE = (
    "recipe",
    "stages",
    "out",
    "data",
    "device",
    "threads",
    "processes",
    "max_minutes",
)
# What only a stage can say.
OF_A_STAGE = ("preset", "init", "teacher")
# What neither can.
OF_ONE_RUN = ("resume", "max_steps")


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe that is to be trained.

    Attributes:
        recipe: what names it, and the flags that were given beside it for all stages.
        lines: of all stages, each its flags and those for all stages.
        number: of this stage, from 1.
        folder: of its run.
        args: its line, parsed, with paths and machine; what begins its run.
    """

    recipe: str
    lines: tuple[str, ...]
    number: int
    folder: Path
    args: argparse.Namespace

    @property
    def line(self) -> str:
        """Flags of this stage, and those for all stages."""
        return self.lines[self.number - 1]

    @property
    def count(self) -> int:
        """Stages of the recipe."""
        return len(self.lines)

    @property
    def is_last(self) -> bool:
        """Whether no stage follows."""
        return self.number == self.count

    @property
    def is_done(self) -> bool:
        """Whether its run has ended."""
        return (self.folder / "report.json").is_file()

    @property
    def has_begun(self) -> bool:
        """Whether its run can be resumed."""
        return (self.folder / "last.safetensors").is_file()

    @property
    def origins(self) -> list[Path]:
        """The folders of those stages that it begins with or learns from."""
        paths = (*(self.args.init or ()), *(self.args.teacher or ()))
        earlier = [stage_folder(self.folder.parent, number) for number in range(1, self.number)]
        return [path for path in paths if path in earlier]

    def describe(self) -> str:
        """Its number, state and flags, in a line."""
        state = "done" if self.is_done else "stopped" if self.has_begun else "not begun"
        return f"stage {self.number} of {self.count}, {state}, {self.folder}: {self.line}"

    def resumed(self) -> argparse.Namespace:
        """The flags that go on with it."""
        args = build_parser().parse_args([])
        for name in ("data", "device", "threads", "processes", "max_minutes"):
            setattr(args, name, getattr(self.args, name))
        args.resume, args.stage, args.repeat = self.folder, self, self.args.repeat
        return args


def is_bare(args: argparse.Namespace) -> bool:
    """Whether the flags say nothing of what is to be trained: the default recipe is meant."""
    says = ("preset", "recipe", "init", "teacher", "resume", "data")
    return all(getattr(args, name) is None for name in says) and not overrides(args)


def shipped_recipes() -> list[str]:
    """Names of the recipes in `training/recipes`."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


@dataclass(frozen=True)
class Recipe:
    """What the file of a recipe holds.

    Attributes:
        lines: its stages, each a line of flags.
        took: how long it took, and where; None where nobody has said it.
    """

    lines: list[str]
    took: str | None = None


def read_recipe(recipe: str) -> Recipe:
    """Read a recipe.

    Args:
        recipe: path of a file, or the name of one in `training/recipes`.

    Raises:
        ValueError: there is none, or it is no recipe; a sentence for the user.
    """
    shipped = shipped_recipes()
    path = SHIPPED / f"{recipe}.toml" if recipe in shipped else Path(recipe)
    if not path.is_file():
        raise ValueError(
            f"--recipe {recipe}: there is no such file, and no such recipe; there are {', '.join(shipped)}."
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {recipe}: is no TOML ({error}).") from error
    stages, took = content.get("stages"), content.get("took")
    if not {"stages"} <= content.keys() <= {"stages", "took"} or not isinstance(stages, list) or not stages:
        raise ValueError(
            f'--recipe {recipe}: must hold stages = ["flags of a stage", ...], may hold took = "how long", and nothing '
            "else."
        )
    if not all(isinstance(line, str) for line in stages):
        raise ValueError(f"--recipe {recipe}: each of its stages must be a text, the flags of that stage.")
    if not isinstance(took, str | None):
        raise ValueError(f'--recipe {recipe}: took must be a text, such as "a day on two cores".')
    return Recipe(stages, took)


def find_recipe(run: RunConfig) -> str | None:
    """The shipped recipe whose stages are the runs that led to one and that one itself, whoever started them.

    The precision, which is the machine's, may differ.
    """
    parser = build_parser()
    plans = {name: plan(parser.parse_args(flags := ["--recipe", name]), flags) for name in shipped_recipes()}
    return next((name for name, stages in plans.items() if _has_trained(stages, run)), None)


def _has_trained(stages: Sequence[Stage], run: RunConfig) -> bool:
    """Whether each stage is one of the runs that led to this one, and the last is this one."""
    left = list(run.ancestry())
    if len(stages) != len(left) + 1 or any(
        (origin.run.dataset, origin.run.labels) != (run.dataset, run.labels) for origin in left
    ):
        return False
    digests: dict[Path, str] = {}
    for stage in stages[:-1]:
        found = next((origin for origin in left if _trains(stage, origin.run, digests)), None)
        if found is None:
            return False
        left.remove(found)
        digests[stage.folder] = found.checkpoint_sha256
    return _trains(stages[-1], run, digests)


def _trains(stage: Stage, run: RunConfig, digests: Mapping[Path, str]) -> bool:
    """Whether a stage's flags are those of a run; ``digests`` are of the stages before it."""
    begins_with = [digests.get(path) for path in (*(stage.args.init or ()), *(stage.args.teacher or ()))]
    if begins_with != [origin.checkpoint_sha256 for origin in run.origins]:
        return False
    name = stage.args.preset or (run.init.run.preset if run.init else DEFAULT_PRESET)
    preset, changes = PRESETS[name], overrides(stage.args)
    model = changed(run.init.run.model if run.init else preset.model, changes)
    model = model.model_copy(update={"num_classes": run.model.num_classes})
    train = changed(preset.train, changes).model_copy(update={"precision": run.train.precision})
    return (name, model, train) == (run.preset, run.model, run.train)


def plan(args: argparse.Namespace, argv: list[str]) -> list[Stage]:
    """The stages of the recipe that the flags name.

    Args:
        args: of `training.cli.build_parser`, with a recipe.
        argv: what they were parsed from; the same again goes on where it was.

    Raises:
        ValueError: there is no such recipe, or a flag does not belong there; a sentence for the user.
    """
    if given := _given(args, OF_ONE_RUN):
        raise ValueError(
            f"{given} is for one run, and --recipe {args.recipe} goes on by itself: leave one of them out."
        )
    if given := _given(args, OF_A_STAGE):
        raise ValueError(f"--recipe takes no {given}: its stages say that; leave it out, or write a recipe.")
    name = args.recipe if (SHIPPED / f"{args.recipe}.toml").is_file() else Path(args.recipe).name
    for_all = shlex.join(_given_flags(argv))
    recipe = " ".join(filter(None, (shlex.join(["--recipe", name]), for_all)))
    lines = tuple(" ".join(filter(None, (line, for_all))) for line in read_recipe(args.recipe).lines)
    folder = args.out or Path("runs") / Path(name).stem
    parser = build_parser()
    stages: list[Stage] = []
    for number, line in enumerate(lines, 1):
        where = f"--recipe {args.recipe}: stage {number}"
        try:
            mine = parser.parse_args(shlex.split(line))
        except SystemExit:
            print(f"error: {where} has flags that can't be read.", file=sys.stderr)
            raise
        except ValueError as error:  # of shlex
            raise ValueError(f"{where} can't be read ({error}): {line}") from error
        if given := _given(mine, OF_ONE_RUN):
            raise ValueError(f"{where} says {given}, which is for one run and not for a recipe: leave it out.")
        if given := _given(mine, OF_THE_WHOLE):
            raise ValueError(f"{where} says {given}, which is given beside --recipe.")
        if mine.init is None and mine.preset is None and stages:
            mine.init = [stages[-1].folder]
        for origin in ("init", "teacher"):
            if (paths := getattr(mine, origin)) is not None:
                setattr(mine, origin, [_folder_of(path, stages, where) for path in paths])
        for each in ("data", "device", "threads", "processes", "max_minutes"):
            setattr(mine, each, getattr(args, each))
        mine.out = stage_folder(folder, number)
        mine.stage = Stage(recipe, lines, number, mine.out, mine)
        mine.repeat = argv
        stages.append(mine.stage)
    return stages


def stage_folder(folder: Path, number: int) -> Path:
    """The folder of a stage, in that of the recipe's run."""
    return folder / f"stage-{number}"


def _folder_of(path: Path, before: list[Stage], where: str) -> Path:
    """The run of an earlier stage where a path is its name, else the path; ``where`` it is named."""
    earlier = next((stage.folder for stage in before if str(path) == stage.folder.name), None)
    if earlier is None and re.fullmatch(r"stage-\d+", str(path)) and not path.exists():
        raise ValueError(f"{where} names {path}: name a stage before it, from stage-1.")
    return earlier or path


def check_flags(stages: Sequence[Stage]) -> dict[Path, Beginning]:
    """Choose the preset of each stage that has not begun: what is wrong with its flags is said before any trains.

    Returns:
        What each stage is or will be, by its folder.

    Raises:
        ValueError: a sentence for the user, with the stage.
    """
    earlier: dict[Path, Beginning] = {}
    for stage in stages:
        try:
            if stage.is_done or stage.has_begun:
                earlier[stage.folder] = _begun(stage)
                stage.args.preset = earlier[stage.folder].preset
            elif (preset := choose_preset(stage.args, earlier)) is not None:
                earlier[stage.folder] = Beginning(stage.args.preset, preset.model)
        except ValueError as error:
            raise ValueError(f"stage {stage.number} of {stage.count}: {error}") from error
    return earlier


def _begun(stage: Stage) -> Beginning:
    """What a stage that has begun gives to those that begin with it."""
    from training import checkpoint  # which takes seconds, for torch

    try:
        return Beginning.of(checkpoint.read_config(stage.folder))
    except checkpoint.CheckpointError as error:
        raise ValueError(str(error)) from error


def _given_flags(argv: list[str]) -> list[str]:
    """The flags of model and recipe among the arguments, as they were given."""
    machine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OF_THE_WHOLE:
        flag = "--" + name.replace("_", "-")
        machine.add_argument(flag, **({"action": "store_true"} if name == "stages" else {}))
    return machine.parse_known_args(argv)[1]


def _given(args: argparse.Namespace, names: Sequence[str]) -> str:
    """Those flags among some that say something, as one types them."""
    default = build_parser().get_default
    said = (name for name in names if getattr(args, name) not in (None, False, default(name)))
    return ", ".join("--" + name.replace("_", "-") for name in said)
