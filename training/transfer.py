"""Begin a run with another's weights: of the same data, with finer patches, more latents, more blocks, or of others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from training import checkpoint
from training.checkpoint import CheckpointError, Header, Origin, RunConfig
from training.cli import format_flag
from training.config import ModelConfig
from training.data.dataset import DataError
from training.data.load import load_for
from training.network import Network
from training.recipe import stage_folder
from training.recipe_run import read_recipe_run
from training.report_schema import read_test_readings

Overlap = Literal["share", "images"]

# What a model may differ in from the one whose weights it takes. What else must hold of the patches' size in pixels, of
# the latents' number and of the blocks, which may only be more, is checked apart.
MAY_DIFFER = {
    "num_classes",
    "input_size",
    "image_size",
    "patch_size",
    "patch_overlap",
    "num_latents",
    "num_blocks",
    "latent_init",
    "latent_std",
    "attention_fans",
    "attention_dropout",
    "ffn_dropout",
    "logits_dropout",
    "drop_path",
    "latent_dropout",
    "test_time_flip",
}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: a ``.safetensors`` file; a run's folder, of which ``best`` is taken; a recipe's run, of which the last
            stage's is; or a model folder, of which the newest version's is.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        return path
    if (whole := read_recipe_run(path)) is not None:
        path = stage_folder(path, len(whole.stages))
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: the recipe's last stage has not begun; go on with the recipe, or name an earlier stage."
            )
    # Of the folders whose name is a plain positive integer, as the service counts them: no "03", no backup of one.
    versions = [folder for folder in path.iterdir() if re.fullmatch("[1-9][0-9]*", folder.name) and folder.is_dir()]
    candidates = [path / "best.safetensors", path / "checkpoint.safetensors"]
    if versions:
        candidates.append(max(versions, key=lambda folder: int(folder.name)) / "checkpoint.safetensors")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path}: holds no checkpoint; name a run's folder, a model folder with checkpoint.safetensors, or such a file."
    )


def read_origin(path: Path) -> Origin:
    """Tell what a run begins with, or what teaches it.

    Args:
        path: a ``.safetensors`` file.

    Raises:
        CheckpointError: it can't be read.
    """
    tensors, header = checkpoint.load(path)
    return Origin(
        checkpoint_sha256=checkpoint.digest(path),
        weights_sha256=checkpoint.digest_of(tensors),
        epoch=header.epoch,
        git_commit=header.git_commit,
        run=header.run,
        test_readings=read_test_readings(path.parent),
    )


def load_origin(path: Path, origin: Origin) -> tuple[dict[str, Tensor], Header]:
    """Read the checkpoint that `read_origin` has seen.

    Raises:
        CheckpointError: it can't be read, or is no longer that one.
    """
    if checkpoint.digest(path) != origin.checkpoint_sha256:
        raise CheckpointError(f"{path}: has changed since this run was prepared; start it again.")
    return checkpoint.load(path)


def check_compatible(path: Path, theirs: ModelConfig, mine: ModelConfig) -> None:
    """Raise CheckpointError, with the flags that would put it right, unless one model can take the other's weights."""
    free = MAY_DIFFER | ({"sharing"} if theirs.num_iterations == 1 else set())  # of which one iteration has none
    free |= {"self_heads", "self_head_dim"} if theirs.num_blocks == 0 else set()  # then all blocks are fresh
    differing = [name for name in ModelConfig.model_fields if name not in free]
    differing = [name for name in differing if getattr(theirs, name) != getattr(mine, name)]
    is_deeper = mine.num_blocks > theirs.num_blocks
    if mine.num_blocks < theirs.num_blocks or (is_deeper and mine.network == "residual"):
        differing.append("num_blocks")
    if mine.num_latents != theirs.num_latents and "normal" in (mine.latent_init, theirs.latent_init):
        differing.append("num_latents")  # only latents that stand on a grid have others between them
    if mine.latent_init == "grid" and not theirs.cross_position_bias:
        differing.append("latent_init")  # which needs what that model lacks
    if differing:
        # Of the same kernel another grid would do too, but is seldom what is wanted.
        differing += [name for name in ("patch_size", "patch_overlap") if getattr(theirs, name) != getattr(mine, name)]
        flags = " ".join(format_flag(name, getattr(theirs, name)) for name in differing)
        raise CheckpointError(f"{path}: is of a model that this one can't begin with; it could with {flags}.")
    if theirs.kernel != mine.kernel:
        raise CheckpointError(
            f"{path}: its patches reach over {theirs.kernel} pixels, and this model's over {mine.kernel}: "
            "patch_size + 2 * patch_overlap must be the same."
        )
    if theirs.position != "learned" and theirs.grid != mine.grid:
        raise CheckpointError(
            f"{path}: its Fourier features are of a grid of {theirs.grid} x {theirs.grid} patches, and this model's "
            f"would be others, of {mine.grid} x {mine.grid}: image_size / patch_size must be the same."
        )


def validation_overlap(run: RunConfig, theirs: RunConfig, path: Path | None, *, has_val: bool) -> Overlap | None:
    """Why images that validate a run may have trained another that it goes back to, as far as anybody knows.

    Args:
        run: whose images validate now.
        theirs: the other.
        path: of the run's data; they are read again where the other held out more of them, or had them at another size.
        has_val: whether the data tell themselves what validates.

    Returns:
        "share" where the other held out fewer of the same images, "images" where those were others or can't be read
        as it read them, None where neither is so.
    """
    digests = (run.pictures_sha256, theirs.pictures_sha256)
    if digests[0] == digests[1] is not None:
        return None
    if run.labels != theirs.labels:
        # With a class more, others may be drawn for validation, of the old ones too.
        return "images" if run.dataset == theirs.dataset and set(run.labels) & set(theirs.labels) else None
    if run.train.validation_fraction > theirs.train.validation_fraction and not has_val:
        return "share"
    if None in digests:
        return None
    if (run.model.input_size, run.train.validation_fraction) == (
        theirs.model.input_size,
        theirs.train.validation_fraction,
    ):
        return "images"
    try:
        return None if load_for(theirs, path).digest() == theirs.pictures_sha256 else "images"
    except DataError:
        return "images"


def validation_overlaps(run: RunConfig, path: Path | None, *, has_val: bool) -> list[tuple[Overlap, RunConfig]]:
    """The runs that led to a run and may have trained on what validates it, with why; see `validation_overlap`.

    Of those that had the same images, divided the same way, only the first is looked at.
    """
    runs: dict[tuple[object, ...], RunConfig] = {}
    for theirs in (origin.run for origin in run.ancestry()):
        images = (theirs.dataset, theirs.pictures_sha256, theirs.labels)
        runs.setdefault((*images, theirs.model.input_size, theirs.train.validation_fraction), theirs)
    reasons = ((validation_overlap(run, theirs, path, has_val=has_val), theirs) for theirs in runs.values())
    return [(why, theirs) for why, theirs in reasons if why is not None]


def load_initial_weights(model: Network, run: RunConfig, paths: Sequence[Path]) -> None:
    """Copy a checkpoint's weights into a fresh model, or the mean of several (Wortsman et al. 2022, "model soups").

    What belongs to positions in the image is interpolated where the patches, or latents on a grid, stand closer or
    wider (bicubic, as Dosovitskiy et al. 2021, section 3.2, do). Blocks that the checkpoint lacks stand after its own
    in each iteration, and add nothing until they have learned to (zero output layers, as Goyal et al. 2017, section
    5.1, begin their residual blocks). The head stays fresh unless the labels are the same.

    Args:
        model: of ``run``.
        run: what is about to be trained, beginning with these checkpoints.
        paths: ``.safetensors`` files.

    Raises:
        CheckpointError: one can't be read, or is no longer the one that `read_origin` has seen.
    """
    parts = [_fitted_weights(model, run, path, origin) for path, origin in zip(paths, run.inits, strict=True)]
    # Of one checkpoint as they are: a residual network also counts its steps, and of whole numbers there is no mean.
    mean = parts[0]
    if len(parts) > 1:
        mean = {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in mean}
    checkpoint.load_into(model, mean, paths[0])


def _fitted_weights(model: Network, run: RunConfig, path: Path, origin: Origin) -> dict[str, Tensor]:
    """The weights of a checkpoint in the shapes of a fresh model."""
    tensors, header = load_origin(path, origin)
    theirs = header.run.model
    weights = checkpoint.strip_prefix("model", tensors)
    for name in weights:
        if name.endswith("position_embedding"):
            weights[name] = resample(weights[name].T, run.model.num_tokens).T.contiguous()
        elif name == "latents":
            weights[name] = resample(weights[name].T, run.model.num_latents).T.contiguous()
        elif name.endswith("position_bias"):
            bias = resample(weights[name], run.model.num_tokens)
            bias = resample(bias.transpose(1, 2), run.model.num_latents)
            weights[name] = bias.transpose(1, 2).contiguous()
    fresh = model.state_dict()
    if header.run.labels != run.labels:
        weights |= {name: fresh[name] for name in fresh if name.startswith("head.")}
    for i, transformer in enumerate(getattr(model, "transformers", ())):
        for j in range(theirs.num_blocks, len(transformer)):
            block = checkpoint.strip_prefix(f"transformers.{i}.{j}", fresh)
            block |= {name: torch.zeros_like(block[name]) for name in block if ".output." in name}
            weights |= checkpoint.add_prefix(f"transformers.{i}.{j}", block)
    return weights


@torch.no_grad()
def resample(values: Tensor, new_count: int) -> Tensor:
    """Values of square cells that tile the image, float [..., count] -> float [..., new_count]; both are squares."""
    count = values.shape[-1]
    if count == new_count:
        return values
    side, new_side = math.isqrt(count), math.isqrt(new_count)
    planes = values.reshape(1, math.prod(values.shape[:-1]), side, side)
    finer = F.interpolate(planes, size=(new_side, new_side), mode="bicubic", antialias=new_side < side)
    return finer.reshape(*values.shape[:-1], new_count)
