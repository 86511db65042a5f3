"""A recipe's run as a whole: its ``config.json``, and the epochs of its stages counted through."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training import report_schema
from training.checkpoint import RecipeStage
from training.metrics_log import MetricsEntry, read_metrics
from training.recipe import stage_folder


class RecipeRunConfig(BaseModel):
    """``config.json`` of a recipe's run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="--recipe, and flags beside it that hold for every stage")
    stages: tuple[str, ...] = Field(description="flags of each stage, and those for every stage")


def read_recipe_run(folder: Path) -> RecipeRunConfig | None:
    """The configuration of the recipe's run in a folder; None where there is none."""
    try:
        return RecipeRunConfig.model_validate_json((folder / "config.json").read_bytes())
    except (OSError, ValidationError):
        return None


def write_recipe_run(folder: Path, config: RecipeRunConfig) -> None:
    """Write ``config.json``, a stage a line."""
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def recipe_run_of(folder: Path, stage: RecipeStage | None, *, last: bool = False) -> Path | None:
    """The folder of the recipe's run that a run is part of, and lies in.

    Args:
        folder: of the run.
        stage: that the run is.
        last: look no further than the last stage.

    Returns:
        None where the run is no stage, lies elsewhere by now, or is not the last stage and has to be.
    """
    if stage is None:
        return None
    above = folder.resolve().parent
    config = read_recipe_run(above)
    if config is None or folder.resolve() != stage_folder(above, stage.number):
        return None
    if stage.line not in config.stages[stage.number - 1 : stage.number]:
        return None
    return above if stage.number == len(config.stages) or not last else None


def read_stages(folder: Path) -> list[MetricsEntry]:
    """The epochs of all stages so far, of a recipe's run.

    Each has the number of its ``stage``, its number there as ``stage_epoch``, and ``epoch`` and ``step`` counted
    through all stages.

    Raises:
        ValueError: the folder is none of a recipe's run, or a line is damaged; a sentence for the user.
    """
    config = read_recipe_run(folder)
    if config is None:
        raise ValueError(f"{folder}: has no config.json of a recipe's run.")
    entries: list[MetricsEntry] = []
    for number in range(1, len(config.stages) + 1):
        run = stage_folder(folder, number)
        epoch, step = (entries[-1]["epoch"], entries[-1]["step"]) if entries else (0, 0)
        entries += [
            {"stage": number, "stage_epoch": entry["epoch"]}
            | entry
            | {"epoch": epoch + entry["epoch"], "step": step + entry["step"]}
            for entry in read_metrics(run)
        ]
        if not (run / report_schema.FILE).is_file():
            break  # what stands in later ones is of a training before
    return entries
