"""The card's section on how the model was trained, and how to train it again."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pydantic import BaseModel

from export.card.markdown import bullet, code, duration, paragraph, table
from export.source import Source, top5
from service.engine.metadata import ModelMetadata
from training.checkpoint import Origin, RunConfig
from training.cli import format_flag
from training.config import PRESETS
from training.data.dataset import CIFAR100
from training.metrics_log import MACHINE_FIELDS
from training.recipe import find_recipe, read_recipe

STAGE_FOLDER = "runs/stage"
FIRST_EPOCHS = (1, 2, 5)


def changed_fields(config: BaseModel, base: BaseModel | None = None) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another, or from their defaults."""
    fields = type(config).model_fields
    return {name: value for name, value in config if value != (getattr(base, name) if base else fields[name].default)}


def training_commands(source: Source) -> Iterator[str]:
    """Yield the commands that train the model again: that of its recipe, or those of all runs that led to it."""
    machines = source.machines
    launcher, flags = "python", []
    if len(machines) == 1:
        if machines[0].device == "cpu":  # where the default depends on the cores
            flags.append(f"--processes {machines[0].processes} --threads {machines[0].threads}")
        elif machines[0].processes > 1:
            launcher = f"torchrun --standalone --nproc-per-node {machines[0].processes}"
    if (recipe := recipe_of(source.run)) is not None:
        yield " ".join([launcher, "-m training", recipe.flags, *flags, *data_flags(source.run)])
        return
    folders: dict[str, str] = {}
    for number, origin in enumerate(source.run.ancestry(), 1):
        folder = f"{STAGE_FOLDER}-{number}"
        yield training_command("python", origin.run, [f"--out {folder}", *origin_flags(origin.run, folders)])
        folders[origin.checkpoint_sha256] = folder
    yield training_command(launcher, source.run, [*flags, *origin_flags(source.run, folders)])


@dataclass(frozen=True)
class TrainingRecipe:
    """The recipe that a run is the last stage of.

    Attributes:
        flags: --recipe, and what was given beside it.
        lines: flags of each stage that led to the run, by its number.
        took: how long it took, and where; None where the recipe does not say so, or the run tells it itself.
        is_found: whether its stages were started one by one, and are known by what they trained.
    """

    flags: str
    lines: Mapping[int, str]
    took: str | None = None
    is_found: bool = False


def recipe_of(run: RunConfig) -> TrainingRecipe | None:
    """Return the recipe that trained a run from its beginning to its end, or a shipped one that says the same."""
    stages = [each.stage for each in (*(origin.run for origin in run.ancestry()), run)]
    last = run.stage
    if last is not None and last.number == last.count:
        of_recipe = [stage for stage in stages if stage is not None and stage.recipe == last.recipe]
        if len(of_recipe) == len(stages):
            lines = {stage.number: stage.line for stage in sorted(of_recipe, key=attrgetter("number"))}
            return TrainingRecipe(last.recipe, lines)
    found = find_recipe(run)
    if found is None:
        return None
    recipe = read_recipe(found)
    return TrainingRecipe(f"--recipe {found}", dict(enumerate(recipe.lines, 1)), recipe.took, is_found=True)


def data_flags(run: RunConfig) -> list[str]:
    """Return the flag for the images: CIFAR-100 is downloaded; a path of the trainer's machine is private."""
    return [f"--data {shlex.quote(f'DATA/{run.dataset}')}"] if run.data and run.dataset != CIFAR100 else []


def origin_flags(run: RunConfig, folders: Mapping[str, str]) -> list[str]:
    """Return the flags that name a run's initial weights and its teachers.

    Args:
        run: that of the command.
        folders: of earlier runs, by SHA-256 of their checkpoint.
    """
    named = (("--init", run.inits), ("--teacher", run.teachers))
    return [
        " ".join([flag, *(folders[origin.checkpoint_sha256] for origin in origins)])
        for flag, origins in named
        if origins
    ]


def training_command(launcher: str, run: RunConfig, flags: Sequence[str]) -> str:
    """Return the command of one run: preset, `flags`, and every setting that differs from the preset.

    A run with initial weights has the model of these, so what differs from that one is named.
    """
    parts = [launcher, "-m training", f"--preset {run.preset}", *flags, *data_flags(run)]
    preset = PRESETS.get(run.preset)
    changes: dict[str, Any] = {}
    if preset is not None:
        model = preset.model if run.init is None else run.init.run.model
        changes = changed_fields(run.model, model) | changed_fields(run.train, preset.train)
    changes.pop("num_classes", None)  # follows from the data
    if run.dataset != CIFAR100:  # on a small data set the preset's is halved, unless the flag is given
        changes["batch_size"] = run.train.batch_size
    return " ".join([*parts, *(format_flag(name, value) for name, value in changes.items())])


def describe_run(source: Source) -> str:
    """Return the epoch of the weights, the duration and machine of the run, its initial weights and its teachers."""
    inits, own = source.run.inits, len(source.own_epochs)
    of_stages = f" of its {source.stages} stages" if source.stages else ""
    took = ""
    if source.training_seconds is not None:
        took = (
            f" All {len(source.epochs)} epochs{of_stages} took {duration(source.training_seconds)} of training"
            f"{on_machines(source)}."
        )
    earlier = "an earlier stage trains" if recipe_of(source.run) else "the commands before the last train"
    each = "; ".join(f"epoch {init.epoch}, {describe_origin(init)}" for init in inits)
    if source.run.train.epochs == 0 and len(inits) > 1:
        return f"The mean of the weights of {len(inits)} models, which {earlier}: {each}.{took}"
    of_all = f" of {own}" if source.has_own_epochs else ""
    text = f"The weights of epoch {source.epoch}{of_all}{' in the last stage' if source.stages else ''}.{took}"
    match inits:
        case ():
            pass
        case (init,):
            text += (
                f" Training started from the weights of epoch {init.epoch} of another run ({describe_origin(init)}), "
                f"which {earlier}."
            )
        case _:
            text += f" Training started from the mean of the weights of {len(inits)} models, which {earlier}: {each}."
    if source.run.taught_by:
        text += f" Of the targets {source.run.train.distillation:.0%} were "
        match source.run.teachers:
            case ():
                text += "the outputs of that model (knowledge distillation)."
            case (teacher,):
                text += (
                    f"the outputs of another model (knowledge distillation): of epoch {teacher.epoch} of a run that "
                    f"{earlier} as well ({describe_origin(teacher)})."
                )
            case teachers:
                each = "; ".join(f"epoch {teacher.epoch}, {describe_origin(teacher)}" for teacher in teachers)
                text += (
                    f"the mean of the outputs of {len(teachers)} models (knowledge distillation), which {earlier} as "
                    f"well: {each}."
                )
    return text


def describe_origin(origin: Origin) -> str:
    """Return what identifies a checkpoint."""
    return (
        f"preset `{origin.run.preset}` on {code(origin.run.dataset)}, commit `{origin.git_commit or 'unknown'}`, "
        f"checkpoint's SHA-256 `{origin.checkpoint_sha256}`"
    )


def on_machines(source: Source) -> str:
    """Return " on " and the machines; empty where no epoch names one."""
    machines = " and then ".join(map(str, source.machines))
    unnamed = sum(not all(name in epoch for name in MACHINE_FIELDS) for epoch in source.epochs)
    if not machines:
        return ""
    return f" on {machines}" + (f" ({unnamed} of the epochs do not name a machine)" if unnamed else "")


def stage_list(source: Source) -> list[str]:
    """Return the stages of the recipe that trained a run, in lines; empty where none did."""
    recipe = recipe_of(source.run)
    if recipe is None:
        return []
    took = "" if recipe.took is None else f"It took {recipe.took}. "
    one_by_one = "Its stages were started one by one; this command draws other random numbers. "
    order = "Each of these stages begins with the one before it, unless it says otherwise:"
    return [
        paragraph(f"{took}{one_by_one if recipe.is_found else ''}{order}"),
        "",
        *(f"- stage-{number}: {code(line)}" for number, line in recipe.lines.items()),
        "",
    ]


def first_epochs(source: Source) -> str:
    """Return the start of the learning curve, to compare a new run with; empty where it is not known."""
    names = ("train_loss", "val_loss", "val_top1", "val_top5")
    rows = [
        (
            f"{epoch['epoch']}",
            f"{epoch['train_loss']:.3f}",
            f"{epoch['val_loss']:.3f}",
            f"{epoch['val_top1']:.1%}",
            *top5(source, f"{epoch['val_top5']:.1%}"),
        )
        for epoch in source.epochs
        if epoch["epoch"] in FIRST_EPOCHS and all(name in epoch for name in names)
    ]
    if not rows:
        return ""
    whose = "its" if source.stages or recipe_of(source.run) is None else "the last stage's"
    text = paragraph(
        f"These were {whose} first epochs, on validation images. A new run comes close to them; it repeats them bit "
        "for bit only on the same device with as many processes and threads. `metrics.json` has every epoch."
    )
    head = ("epoch", "training loss", "validation loss", "top-1", *top5(source, "top-5"))
    return f"{text}\n\n{table(head, rows)}\n"


def training_record(source: Source, metadata: ModelMetadata) -> str:
    """Return the section."""
    commands = [f"python -m export --random {metadata.preset}"]
    text = "Random weights:"
    if source.checkpoint is not None:
        commands = list(training_commands(source))
        text = f"{paragraph(describe_run(source))} Train it again by:"
    settings = [
        bullet(f"{name}: {', '.join(f'{key} {value}' for key, value in changed_fields(config).items())}.")
        for name, config in (("Model", source.run.model), ("Recipe", source.run.train))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in metadata.provenance.versions.items())
    curve = first_epochs(source)
    return "\n".join(
        [
            f"## Training record\n\n{text}\n",
            *(f"    {command}" for command in commands),
            "",
            *stage_list(source),
            *([curve] if curve else []),
            *settings,
            f"- Trained by the source tree of commit `{source.git_commit or 'unknown'}`.",
            f"- Checkpoint's SHA-256: `{metadata.provenance.checkpoint_sha256}`.",
            f"- Exported {metadata.provenance.created} with {versions}.",
        ]
    )
