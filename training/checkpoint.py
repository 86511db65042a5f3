"""Checkpoints: one safetensors file whose header carries the configuration as JSON. Nothing in it is ever unpickled.

Tensors are named by what they belong to: ``model.*`` (the weights to use), ``preprocess.*``, and in ``last`` also
``raw.*`` (the trained weights where ``model.*`` are their average) and ``optimizer.*``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from training.build_model import build_model
from training.config import ModelConfig, TrainConfig
from training.evaluate import TOP5_CLASSES, Metrics
from training.network import Network
from training.preprocessing import Preprocess

HEADER = "perceiver"

# Of a disk without room, wherever it is noticed: there may be no checkpoint yet.
DISK_FULL_ADVICE = "make room; a run that has a checkpoint goes on with --resume"


class CheckpointError(Exception):
    """A checkpoint that can't be used: one sentence with the path, what is wrong and what would be right."""


class Origin(BaseModel):
    """The checkpoint whose weights a run begins with, or that teaches it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint_sha256: str
    weights_sha256: str | None = Field(
        None, description="of its tensors alone, `digest_of`; None: a run of before they were told"
    )
    epoch: int = Field(description="after which its weights were taken")
    git_commit: str | None
    run: RunConfig
    test_readings: int | None = Field(
        None, description="how often its run had read its test images by then; None: nobody knows"
    )


class RecipeStage(BaseModel):
    """The stage of a recipe that a run is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="--recipe, and flags beside it that hold for every stage")
    line: str = Field(description="flags of the stage, and those for every stage")
    number: int = Field(ge=1)
    count: int = Field(ge=1, description="stages of the recipe")


class RunConfig(BaseModel):
    """What a run is: enough to start it again.

    Written down, `init`, `averaged` and `teachers` are digests, and ``ancestors`` has each of those runs once. A run
    that begins with another and is taught by it would else hold it twice, and be twice as large with every stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    data: str | None = Field(description="path of the data; None: CIFAR-100 by download")
    dataset: str
    labels: tuple[str, ...]
    superclasses: tuple[int, ...] | None = None
    superclass_names: tuple[str, ...] | None = None
    model: ModelConfig
    train: TrainConfig
    pictures_sha256: str | None = Field(None, description="of training and validation images and labels")
    init: Origin | None = Field(None, description="whose weights it begins with; None: it begins at random")
    averaged: tuple[Origin, ...] = Field((), description="with whose weights it averages those of `init`")
    teachers: tuple[Origin, ...] = Field(
        (), description="whose answers, in the mean, are part of its targets, where not those of `init`"
    )

    stage: RecipeStage | None = Field(None, description="None where no recipe trained it")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """Read what `_write` has written, and runs of before: each held the others whole, and had one teacher."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "teacher" in data:
            teacher = data.pop("teacher")
            data["teachers"] = () if teacher is None else (teacher,)
        known: dict[str, Origin] = {}
        for entry in data.pop("ancestors", ()):
            if not isinstance(entry, dict) or not isinstance(entry.get("run"), dict):
                raise ValueError("one of its ancestors tells of no run")
            origin = Origin.model_validate({**entry, "run": _with_origins(entry["run"], known)})
            known[origin.checkpoint_sha256] = origin
        return _with_origins(data, known)

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        ancestors = [
            {name: getattr(origin, name) for name in Origin.model_fields if name != "run"}
            | {"run": _with_digests(origin.run, handler)}
            for origin in self.ancestry()
        ]
        return _with_digests(self, handler) | ({"ancestors": ancestors} if ancestors else {})

    def without_paths(self) -> RunConfig:
        """The same without where the images lie on this machine, if that is an absolute path: its last part stays."""
        if self.data is None or not Path(self.data).is_absolute():
            return self
        return self.model_copy(update={"data": Path(self.data).name})

    @property
    def with_top5(self) -> bool:
        """Whether top-5 says anything of so many classes."""
        return len(self.labels) >= TOP5_CLASSES

    @property
    def origins(self) -> tuple[Origin, ...]:
        """What it begins with, and what teaches it where those are others."""
        return (*self.inits, *self.teachers)

    @property
    def inits(self) -> tuple[Origin, ...]:
        """The mean of whose weights it begins with; none where it begins at random."""
        return () if self.init is None else (self.init, *self.averaged)

    @property
    def draw_seed(self) -> int:
        """Seed of order, augmentation and dropout, 0..2**32 - 1: the recipe's, mixed with the weights of ``init``.

        A run that begins with another's weights would else see the same augmented images in the same order again. The
        digest of the file would not do: it tells when the file was written, and a recipe would never repeat itself.
        """
        if self.init is None:
            return self.train.seed
        digests = [origin.weights_sha256 or origin.checkpoint_sha256 for origin in self.inits]
        text = "/".join([str(self.train.seed), *digests])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def ancestry(self) -> tuple[Origin, ...]:
        """All that led to this run, each once, in an order in which they can be trained."""
        found: dict[str, Origin] = {}
        self._find_ancestry(found)
        # As this run has seen them: one that others have seen earlier may have told less then.
        found |= {origin.checkpoint_sha256: origin for origin in reversed(self.origins)}
        return tuple(found.values())

    def _find_ancestry(self, found: dict[str, Origin]) -> None:
        for origin in self.origins:
            if origin.checkpoint_sha256 not in found:
                origin.run._find_ancestry(found)
                found[origin.checkpoint_sha256] = origin

    def lineage_test_readings(self, own: int) -> int:
        """How often this run and those that led to it have read its test images.

        A run that does not tell counts once, since every run that ends reads them.

        Args:
            own: readings of this run.
        """
        others = (origin for origin in self.ancestry() if origin.run.dataset == self.dataset)
        return own + sum(1 if origin.test_readings is None else origin.test_readings for origin in others)

    @property
    def taught_by(self) -> tuple[Origin, ...]:
        """Whose answers are part of the targets."""
        return (self.teachers or self.inits) if self.train.distillation else ()


def _with_digests(run: RunConfig, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """A run as it is written, its origins by their digests."""
    data: dict[str, Any] = handler(run.model_copy(update={"init": None, "averaged": (), "teachers": ()}))
    for name in ("averaged", "teachers"):
        data[name] = [origin.checkpoint_sha256 for origin in getattr(run, name)]
    return data | {"init": None if run.init is None else run.init.checkpoint_sha256}


def _with_origins(data: dict[str, Any], known: dict[str, Origin]) -> dict[str, Any]:
    """Put origins in the place of their digests.

    Raises:
        ValueError: one is not known.
    """

    def find(origin: Any) -> Any:
        if isinstance(origin, str) and origin not in known:
            raise ValueError(f"it goes back to {origin}, which is not among its ancestors")
        return known[origin] if isinstance(origin, str) else origin

    several = {name: tuple(map(find, data[name])) for name in ("averaged", "teachers") if name in data}
    return data | several | {"init": find(data.get("init"))}


class Header(BaseModel):
    """The JSON in a checkpoint's header."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    run: RunConfig
    epoch: int = Field(description="finished epochs")
    step: int = Field(description="finished steps")
    val: Metrics | None
    git_commit: str | None
    created: str
    versions: dict[str, str]
    state: dict[str, Any] = Field(default_factory=dict, description="what resuming needs beside tensors")


@cache
def git_commit() -> str | None:
    """The commit of the source tree, ``-dirty`` behind it when files were changed; None where nobody knows it.

    Outside git, as in a container, the environment variable ``REVISION`` tells it, with which the image was built.

    Looked up once: what runs is the tree of then, whatever becomes of it in the hours of a run.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 -- fixed words
    except (OSError, subprocess.CalledProcessError):
        revision = os.environ.get("REVISION", "")
        return revision if revision not in ("", "unknown") else None


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in ("torch", "numpy", "pytorch_optimizer"))


def make_header(run: RunConfig, epoch: int, step: int, val: Metrics | None, state: dict[str, Any]) -> Header:
    """A header that says where and when it was made, and no path of this machine."""
    return Header(
        run=run.without_paths(),
        epoch=epoch,
        step=step,
        val=val,
        git_commit=git_commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=dict(_versions()),
        state=state,
    )


def save(path: Path, tensors: dict[str, Tensor], header: Header) -> None:
    """Write a checkpoint under another name, then rename it: a run that is killed leaves the last one whole.

    Raises:
        CheckpointError: it can't be written, say since the disk is full.
    """
    partial = path.with_suffix(".partial")
    # Clones, because weights that share storage are refused, and expanded ones are not contiguous.
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(held, partial, metadata={HEADER: header.model_dump_json()})
    except SafetensorError as error:  # also where the disk is full
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written ({error}): {DISK_FULL_ADVICE}.") from error
    with partial.open("rb+") as file:
        os.fsync(file.fileno())  # a power cut would else leave a name without its bytes
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)  # safetensors lets nobody else read it
    partial.replace(path)


def read_config(folder: Path) -> RunConfig:
    """What the run in a folder is, from its ``config.json``.

    Raises:
        CheckpointError: it has none, or one that can't be read.
    """
    path = folder / "config.json"
    try:
        return RunConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder}: is no run; it has no config.json.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is damaged, it is no text; restore it, or start a new run.") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is not of this version of the project: {error.errors()[0]['msg']}.") from error


def load(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; name a run's or a model's folder, or a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({error}); train or copy it again."
        ) from error
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not one that `python -m training` wrote.")
    try:
        return tensors, Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: its header does not fit this version of the project ({where}: {first['msg']})."
        ) from error


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of tensors, hexadecimal; their order does not count."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put ``prefix.`` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def load_into(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights, or say in a sentence why they don't fit.

    Raises:
        CheckpointError: names or shapes are those of another architecture.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: its weights are of another model than its configuration says: {error}"
        ) from error


def load_model(path: Path) -> tuple[Network, Preprocess, Header]:
    """Build the model that a checkpoint describes, in evaluation mode on the CPU, with its preprocessing.

    Args:
        path: a ``.safetensors`` file, or a run's folder, of which ``best`` is taken.

    Raises:
        CheckpointError: see `load`.
    """
    path = path / "best.safetensors" if path.is_dir() else path
    tensors, header = load(path)
    model = build_model(header.run.model)
    preprocess = Preprocess(header.run.model.image_size)
    load_into(model, strip_prefix("model", tensors), path)
    load_into(preprocess, strip_prefix("preprocess", tensors), path)
    return model.eval(), preprocess, header


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"scalars": scalars, "param_groups": json.loads(json.dumps(state["param_groups"]))}


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], packed: dict[str, Any]) -> None:
    """Undo `pack_optimizer`: load the state into a fresh optimiser of the same parameters."""
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in packed["scalars"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, packed["param_groups"], strict=True):
        for key, value in saved.items():
            if key in ("fused", "foreach"):
                continue  # how it computes: the fresh one's choice, for the device it is on
            # JSON has no tuples: betas come back as a list.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
