"""Recipes: the stages of a training, each a line of flags, as TOML files. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.cli import DEFAULT_PRESET, build_parser, changed, overrides
from training.config import PRESETS

if TYPE_CHECKING:
    from training.checkpoint import RunConfig

SHIPPED = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "version-12"  # what made the shipped model

# What belongs to the machine or to the run as a whole, and is given beside --recipe.
OF_THE_WHOLE = (
    "recipe",
    "stages",
    "resume",
    "out",
    "data",
    "device",
    "threads",
    "processes",
    "max_minutes",
    "max_steps",
)
# What only a stage can say.
OF_A_STAGE = ("preset", "init", "teacher", "resume", "max_steps")


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
    """Whether the flags of each stage are those of a run that led to this one, in that order."""
    ancestry = run.ancestry()
    runs = [*(origin.run for origin in ancestry), run]
    if len(stages) != len(runs):
        return False
    # Of all stages but the last, which led to none.
    digests = {stage.folder: origin.checkpoint_sha256 for stage, origin in zip(stages, ancestry, strict=False)}
    for stage, theirs in zip(stages, runs, strict=True):
        begins_with = [digests.get(path) for path in (*(stage.args.init or ()), *(stage.args.teacher or ()))]
        if begins_with != [origin.checkpoint_sha256 for origin in theirs.origins]:
            return False
        name = stage.args.preset or (theirs.init.run.preset if theirs.init else DEFAULT_PRESET)
        preset, changes = PRESETS[name], overrides(stage.args)
        model = changed(theirs.init.run.model if theirs.init else preset.model, changes)
        model = model.model_copy(update={"num_classes": theirs.model.num_classes})
        train = changed(preset.train, changes).model_copy(update={"precision": theirs.train.precision})
        if (name, model, train) != (theirs.preset, theirs.model, theirs.train):
            return False
        if (theirs.dataset, theirs.labels) != (run.dataset, run.labels):
            return False
    return True


def plan(args: argparse.Namespace, argv: list[str]) -> list[Stage]:
    """The stages of the recipe that the flags name.

    Args:
        args: of `training.cli.build_parser`, with a recipe.
        argv: what they were parsed from; the same again goes on where it was.

    Raises:
        ValueError: there is no such recipe, or a flag does not belong there; a sentence for the user.
    """
    given = [name for name in OF_A_STAGE if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--recipe takes no {_flags(given)}: its stages say that; leave it out, or write a recipe.")
    name = args.recipe if (SHIPPED / f"{args.recipe}.toml").is_file() else Path(args.recipe).name
    for_all = shlex.join(_given_flags(argv))
    recipe = " ".join(filter(None, (shlex.join(["--recipe", name]), for_all)))
    lines = tuple(" ".join(filter(None, (line, for_all))) for line in read_recipe(args.recipe).lines)
    folder = args.out or Path("runs") / Path(name).stem
    parser = build_parser()
    stages: list[Stage] = []
    for number, line in enumerate(lines, 1):
        try:
            mine = parser.parse_args(shlex.split(line))
        except SystemExit:
            print(f"error: --recipe {args.recipe}: stage {number} has flags that can't be read.", file=sys.stderr)
            raise
        given = [each for each in OF_THE_WHOLE if getattr(mine, each) not in (None, False, parser.get_default(each))]
        if given:
            raise ValueError(
                f"--recipe {args.recipe}: stage {number} says {_flags(given)}, which is given beside --recipe."
            )
        if mine.init is None and mine.preset is None and stages:
            mine.init = [stages[-1].folder]
        for origin in ("init", "teacher"):
            if (paths := getattr(mine, origin)) is not None:
                setattr(mine, origin, [_folder_of(path, stages) for path in paths])
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


def _folder_of(path: Path, before: list[Stage]) -> Path:
    """The run of an earlier stage where a path is its name, else the path."""
    return next((stage.folder for stage in before if str(path) == stage.folder.name), path)


def _given_flags(argv: list[str]) -> list[str]:
    """The flags of model and recipe among the arguments, as they were given."""
    machine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OF_THE_WHOLE:
        flag = "--" + name.replace("_", "-")
        machine.add_argument(flag, **({"action": "store_true"} if name == "stages" else {}))
    return machine.parse_known_args(argv)[1]


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
