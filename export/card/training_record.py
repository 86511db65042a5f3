"""The card's section on how a model was made, and what it takes to make it again."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from export.card.markdown import bullet, code, duration, paragraph, table
from export.source import Source
from service.engine.metadata import ModelMetadata
from training.checkpoint import Origin, RunConfig
from training.cli import flag_with
from training.config import PRESETS
from training.data.dataset import CIFAR100
from training.metrics_log import MACHINE

BEGINNING = "runs/beginning"
FIRST_EPOCHS = (1, 2, 5)


def non_defaults(config: BaseModel) -> dict[str, Any]:
    """Return the fields of a configuration that are not at their default."""
    fields = type(config).model_fields
    return {name: value for name, value in config if value != fields[name].default}


def changed_fields(config: BaseModel, base: BaseModel) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another."""
    return {name: value for name, value in config if value != getattr(base, name)}


def training_commands(source: Source) -> Iterator[str]:
    """Yield the commands that train the model again, those of what it began with or learned from first."""
    machines = source.machines
    launcher, words = "python", []
    if len(machines) == 1 and machines[0].processes > 1:
        launcher = f"torchrun --standalone --nproc-per-node {machines[0].processes}"
        if machines[0].device == "cpu":
            words.append(f"--threads {machines[0].threads}")
    folders: dict[str, str] = {}
    for number, origin in enumerate(source.run.ancestry(), 1):
        folder = f"{BEGINNING}-{number}"
        yield training_command("python", origin.run, [f"--out {folder}", *beginnings(origin.run, folders)])
        folders[origin.checkpoint_sha256] = folder
    yield training_command(launcher, source.run, [*words, *beginnings(source.run, folders)])


def beginnings(run: RunConfig, folders: Mapping[str, str]) -> list[str]:
    """Return the flags that name what a run began with and what taught it.

    Args:
        run: that of the command.
        folders: of the runs before it, by SHA-256 of their checkpoint.
    """
    flags = (("--init", run.init), ("--teacher", run.teacher))
    return [f"{flag} {folders[origin.checkpoint_sha256]}" for flag, origin in flags if origin is not None]


def training_command(launcher: str, run: RunConfig, more: Sequence[str]) -> str:
    """Return the command of one run: preset, every flag that differs from it, and more."""
    words = [launcher, "-m training", f"--preset {run.preset}", *more]
    if run.data and run.dataset != CIFAR100:  # which is downloaded where none is named
        # Where it was on the trainer's machine is nobody else's matter.
        words.append(f"--data {shlex.quote(f'DATA/{run.dataset}')}")
    preset = PRESETS.get(run.preset)
    changes = (changed_fields(run.model, preset.model) | changed_fields(run.train, preset.train)) if preset else {}
    changes.pop("num_classes", None)  # the data decide it
    if run.dataset != CIFAR100:  # of few pictures the preset's is halved, unless it is given
        changes["batch_size"] = run.train.batch_size
    return " ".join([*words, *(flag_with(name, value) for name, value in changes.items())])


def origin(source: Source) -> str:
    """Tell the epoch of the weights, how long the whole run took on what, and what it began with."""
    epochs = len(source.lines)
    of_all = f" of {epochs}" if epochs >= source.epoch else ""
    words = f"The weights of epoch {source.epoch}{of_all}."
    if source.training_seconds is not None:
        words += f" All {epochs} epochs took {duration(source.training_seconds)} of training{place(source)}."
    if (init := source.run.init) is not None:
        words += (
            f" They began with the weights that epoch {init.epoch} of another run left ({identity(init)}), which the "
            "commands before the last train."
        )
    if (teacher := source.run.taught_by) is not None:
        words += f" Of the targets {source.run.train.distillation:.0%} were "
        if source.run.teacher is None:
            words += "that model's own answers (knowledge distillation)."
        else:
            words += (
                f"another model's answers (knowledge distillation): of epoch {teacher.epoch} of a run that the "
                f"commands before the last train as well ({identity(teacher)})."
            )
    return words


def identity(origin: Origin) -> str:
    """Return the words that tell one checkpoint from all others."""
    return (
        f"preset `{origin.run.preset}` on {code(origin.run.dataset)}, commit `{origin.git_commit or 'unknown'}`, "
        f"checkpoint's SHA-256 `{origin.checkpoint_sha256}`"
    )


def place(source: Source) -> str:
    """Return " on " what trained it, and how many epochs tell that where not all do; nothing where none does."""
    machines = " and then ".join(map(str, source.machines))
    silent = sum(not all(name in line for name in MACHINE) for line in source.lines)
    if not machines:
        return ""
    return f" on {machines}" + (f" ({silent} of the epochs do not tell on what)" if silent else "")


def first_epochs(source: Source) -> str:
    """Tell the beginning of the recorded curve, which the command must follow; nothing where it is not known."""
    names = ("train_loss", "val_loss", "val_top1", "val_top5")
    chosen = [line for line in source.lines if line["epoch"] in FIRST_EPOCHS and all(name in line for name in names)]
    if not chosen:
        return ""
    rows = [
        (
            f"{line['epoch']}",
            f"{line['train_loss']:.3f}",
            f"{line['val_loss']:.3f}",
            f"{line['val_top1']:.1%}",
            f"{line['val_top5']:.1%}",
        )
        for line in chosen
    ]
    words = paragraph(
        "Its first epochs were these, by validation pictures; a new run should come close to them, and gives them bit "
        "for bit only on the same device with as many processes and threads. `metrics.json` has every epoch."
    )
    return f"{words}\n\n{table(('epoch', 'training loss', 'validation loss', 'top-1', 'top-5'), rows)}\n"


def making(source: Source, metadata: ModelMetadata) -> str:
    """Say where the weights come from and what it takes to make them again."""
    commands = [f"python -m export --random {metadata.preset}"]
    words = "Random weights:"
    if source.checkpoint is not None:
        commands = list(training_commands(source))
        words = f"{paragraph(origin(source))} Train it again by:"
    settings = [
        bullet(f"{name}: {', '.join(f'{key} {value}' for key, value in non_defaults(config).items())}.")
        for name, config in (("Model", source.run.model), ("Recipe", source.run.train))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in metadata.provenance.versions.items())
    beginning = first_epochs(source)
    return "\n".join(
        [
            f"## How it was made\n\n{words}\n",
            *(f"    {command}" for command in commands),
            "",
            *([beginning] if beginning else []),
            *settings,
            f"- Trained by the source tree of commit `{source.git_commit or 'unknown'}`.",
            f"- Checkpoint's SHA-256: `{metadata.provenance.checkpoint_sha256}`.",
            f"- Exported {metadata.provenance.created} with {versions}.",
        ]
    )
