"""Train, then export what came out as the next version of the model folder that the service watches.

Arguments go to `python -m training`. The variable RUN names the run's folder; a run that has a checkpoint goes on.
MODEL_NAME names the model folder, below /models; with data of one's own it has to. One process does both, so that
signals reach the training.
"""

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

MODELS = Path("/models")
SHIPPED = "perceiver-cifar100"


def main(arguments: list[str]) -> int:
    """Return the exit status: of the training unless it is 0, else of the export."""
    if {"-h", "--help"} & set(arguments):
        return train(["--help"])
    run = Path(os.environ.get("RUN") or f"runs/{datetime.now(UTC):%Y%m%d-%H%M%S}")
    name = os.environ.get("MODEL_NAME")
    if not name and any(argument.partition("=")[0] == "--data" for argument in arguments):
        print(
            f"error: a model of your own images belongs in a folder of its own, not in {SHIPPED}: set MODEL_NAME in "
            f".env, say MODEL_NAME=mine. Where --data is CIFAR-100, set MODEL_NAME={SHIPPED}.",
            file=sys.stderr,
        )
        return 2
    folder = MODELS / (name or SHIPPED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return refuse(folder)
    if not os.access(folder, os.W_OK | os.X_OK):  # known now, not after hours of training
        return refuse(folder)
    where = "--resume" if (run / "last.safetensors").exists() else "--out"
    # Stopped with a checkpoint counts as a failure here: nothing half-trained is served.
    if status := train([where, str(run), *arguments]):
        return status
    exporting = [str(trained_in(run)), "--out", str(folder)]
    if status := export(exporting):
        in_container = "docker compose --profile training run --rm --entrypoint python training"
        print(f"the run is kept; export it alone by: {in_container} -m export {shlex.join(exporting)}", file=sys.stderr)
    return status


def trained_in(run: Path) -> Path:
    """Return the folder of what was trained: of a recipe, that of its last stage."""
    stages = [stage for stage in run.glob("stage-*") if (stage / "report.json").is_file()]
    return max(stages, key=lambda stage: int(stage.name.removeprefix("stage-")), default=run)


def train(arguments: list[str]) -> int:
    """Run `python -m training`, in this process; return its exit status."""
    from training.__main__ import main  # here and below: torch takes seconds to import

    return main(arguments)


def export(arguments: list[str]) -> int:
    """Run `python -m export`, in this process; return its exit status."""
    from export.__main__ import main

    return main(arguments)


def refuse(folder: Path) -> int:
    """Say who may not write, and what to do; return the exit status."""
    print(
        f"error: user {os.getuid()} may not write to {folder}. Set RUN_AS_UID and RUN_AS_GID in .env to the owner of "
        "the models folder on the host, or give the folder to that user.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
