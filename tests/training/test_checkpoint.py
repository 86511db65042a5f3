"""Checkpoints: what goes in comes out, nothing in them is a pickle, and what can't be used is told in a sentence."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.optim import Optimizer

from tests.training.tiny import MODEL, run_config
from training import checkpoint
from training.checkpoint import CheckpointError, Header, Origin, RunConfig
from training.config import ModelConfig, TrainConfig
from training.evaluate import Metrics
from training.model import Perceiver
from training.optim import make_optimizers, set_learning_rates
from training.preprocessing import Preprocess

VAL = Metrics(split="val", n=12, top1=1 / 3, top5=1.0, loss=0.1 + 0.2, ece=0.05)


def model_of_seed(seed: int, **changes: object) -> Perceiver:
    torch.manual_seed(seed)
    return Perceiver(ModelConfig.model_validate(MODEL | changes))


def written(path: Path, **changes: object) -> tuple[Perceiver, Preprocess, Header]:
    """A checkpoint at ``path`` and what it was made of."""
    run = run_config(changes)
    model, preprocess = model_of_seed(1, **changes), Preprocess(8, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    header = checkpoint.make_header(run, 2, 10, VAL, {"plateau": {"factor": 0.2}})
    tensors = checkpoint.add_prefix("model", model.state_dict())
    checkpoint.save(path, tensors | checkpoint.add_prefix("preprocess", preprocess.state_dict()), header)
    return model, preprocess, header


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_checkpoint_gives_back_model_preprocessing_and_header(tmp_path: Path, by_folder: bool) -> None:
    path = tmp_path / "best.safetensors"
    model, preprocess, header = written(path, position="both", cross_position_bias=True)
    loaded, loaded_preprocess, loaded_header = checkpoint.load_model(tmp_path if by_folder else path)
    assert loaded_header == header
    assert not loaded.training
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(loaded(loaded_preprocess(images)), model.eval()(preprocess(images)))


def test_the_file_is_json_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    model, _, header = written(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    listing = json.loads(content[8 : 8 + length])
    assert Header.model_validate_json(listing.pop("__metadata__")["perceiver"]) == header
    assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in listing.values())
    assert set(listing) == {f"model.{name}" for name in model.state_dict()} | {"preprocess.mean", "preprocess.variance"}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_it_is_as_with_other_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        written(tmp_path / "best.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "best.safetensors").stat().st_mode) == 0o666 & ~mask


def test_the_header_says_where_it_comes_from(tmp_path: Path) -> None:
    _, _, header = written(tmp_path / "best.safetensors")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", header.git_commit or "0" * 40)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", header.created)
    assert header.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(("revision", "told"), [("0123abc", "0123abc"), ("unknown", None), ("", None), (None, None)])
def test_without_git_the_environment_tells_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, told: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where no git is
    monkeypatch.delenv("REVISION", raising=False)
    if revision is not None:
        monkeypatch.setenv("REVISION", revision)
    assert checkpoint.git_commit.__wrapped__() == told


def test_a_failed_save_leaves_the_last_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    _, _, header = written(path)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"model.latents": None}, header)  # type: ignore[dict-item]
    assert path.read_bytes() == before


def test_the_digest_is_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert checkpoint.digest(tmp_path / "file").startswith("ba7816bf8f01cfea")


# --- what can't be used


def foreign(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


def with_header(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        written(path)
        tensors, header = checkpoint.load(path)
        content = json.loads(header.model_dump_json())
        change(content)
        save_file(tensors, path, metadata={"perceiver": json.dumps(content)})

    return write


def of_another_shape(content: dict[str, object]) -> None:
    content["run"]["model"]["dim"] = 32  # type: ignore[index]


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such checkpoint"),
    "a folder": (lambda path: path.mkdir(), "no such checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or not a safetensors file"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "damaged or not a safetensors file"),
    "a pickle": (lambda path: torch.save({"weight": torch.ones(2)}, path), "damaged or not a safetensors file"),
    "truncated": (
        lambda path: (written(path), path.write_bytes(path.read_bytes()[:-100])),
        "damaged or not a safetensors file",
    ),
    "foreign": (foreign, "not one that `python -m training` wrote"),
    "of the future": (with_header(lambda content: content.update(format=2)), r"this version of the project \(format"),
    "unknown field": (with_header(lambda content: content["run"]["model"].update(wings=2)), r"run\.model\.wings"),  # type: ignore[index]
    "impossible model": (with_header(lambda content: content["run"]["model"].update(patch_size=3)), "no multiple"),  # type: ignore[index]
    "other weights": (with_header(of_another_shape), "weights are of another model than its configuration says"),
}


@pytest.mark.parametrize(("write", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_cannot_be_used_is_told_with_its_path(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "some.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_model(path)
    assert str(path) in str(caught.value)


def test_a_run_without_best_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.safetensors: no such checkpoint"):
        checkpoint.load_model(tmp_path)


# --- optimisers


def lineage(stages: int) -> RunConfig:
    """A run of so many stages, each of which begins with the one before it and is taught by it and the first."""
    run, origins = run_config(), []
    for number in range(1, stages):
        origins.append(Origin(checkpoint_sha256=f"{number:064x}", epoch=number, git_commit=None, run=run))
        run = run.model_copy(update={"init": origins[-1], "teachers": (origins[-1], origins[0])})
    return run


def test_a_run_is_written_with_each_of_its_ancestors_once() -> None:
    sizes = [len(lineage(stages).model_dump_json()) for stages in (2, 11, 20)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.1)
    run = lineage(20)
    for read in (RunConfig.model_validate_json(run.model_dump_json()), RunConfig.model_validate(run.model_dump())):
        assert read.model_dump() == run.model_dump()
        assert read.draw_seed == run.draw_seed
        assert [origin.epoch for origin in read.ancestry()] == list(range(1, 20))
        assert [teacher.epoch for teacher in read.teachers] == [19, 1]


def test_a_run_of_before_held_its_ancestors_whole() -> None:
    run = lineage(4)

    def whole(run: RunConfig) -> dict[str, object]:
        origins = {origin.checkpoint_sha256: {**dict(origin), "run": whole(origin.run)} for origin in run.origins}
        named = run.model_dump(exclude={"ancestors"})
        teachers = [origins[teacher.checkpoint_sha256] for teacher in run.teachers]
        return named | {"init": origins[run.init.checkpoint_sha256] if run.init else None, "teachers": teachers}

    assert RunConfig.model_validate(whole(run)) == run


def test_an_origin_tells_of_its_run_as_it_has_seen_it_last() -> None:
    """Two runs may have read the same checkpoint, one of them before origins told of their weights."""
    run = lineage(3)
    assert run.init is not None
    told = run.teachers[1].model_copy(update={"weights_sha256": "f" * 64})
    run = run.model_copy(update={"averaged": (told,)})
    read = RunConfig.model_validate(run.model_dump())
    assert read.averaged == (told,)
    assert read.draw_seed == run.draw_seed


def test_an_ancestor_that_is_missing_is_told() -> None:
    content = lineage(3).model_dump() | {"ancestors": []}
    with pytest.raises(ValueError, match=r"it goes back to 0+2, which is not among its ancestors"):
        RunConfig.model_validate(content)
    with pytest.raises(ValueError, match="one of its ancestors tells of no run"):
        RunConfig.model_validate(content | {"ancestors": [{"epoch": 1}]})


def trained(seed: int, config: TrainConfig, steps: int) -> tuple[Perceiver, list[Optimizer]]:
    model = model_of_seed(seed)
    optimizers = make_optimizers(model, config)
    train(model, optimizers, range(steps))
    return model, optimizers


def train(model: Perceiver, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        set_learning_rates(optimizers, 1 / (step + 1))
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["lamb", "adamw", "muon"])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimiser_goes_on_exactly_from_its_packed_state(tmp_path: Path, name: str, steps: int) -> None:
    config = TrainConfig.model_validate({"optimizer": name, "weight_decay": 0.1})
    model, optimizers = trained(1, config, steps)
    tensors = checkpoint.add_prefix("model", model.state_dict())
    packed = [checkpoint.pack_optimizer(optimizer) for optimizer in optimizers]
    for i, (moments, _) in enumerate(packed):
        tensors |= checkpoint.add_prefix(str(i), moments)
    state = {"optimizers": [scalars for _, scalars in packed]}
    checkpoint.save(tmp_path / "last", tensors, checkpoint.make_header(run_config(), 0, steps, None, state))

    tensors, header = checkpoint.load(tmp_path / "last")
    resumed, fresh = trained(2, config, 0)
    resumed.load_state_dict(checkpoint.strip_prefix("model", tensors))
    for i, (optimizer, scalars) in enumerate(zip(fresh, header.state["optimizers"], strict=True)):
        checkpoint.unpack_optimizer(optimizer, checkpoint.strip_prefix(str(i), tensors), scalars)

    for one in ((model, optimizers), (resumed, fresh)):
        train(*one, range(steps, steps + 3))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for one, other in zip(optimizers, fresh, strict=True):
        (moments, scalars), (expected_moments, expected_scalars) = map(checkpoint.pack_optimizer, (one, other))
        assert scalars == expected_scalars
        assert moments.keys() == expected_moments.keys()
        assert all(torch.equal(moment, expected_moments[name]) for name, moment in moments.items())


def test_how_an_optimiser_computes_is_not_resumed(tmp_path: Path) -> None:
    """A run begun on a CPU and resumed on a GPU takes the GPU's way, and the other way round."""
    config = TrainConfig.model_validate({"optimizer": "adamw"})
    _, (begun,) = trained(1, config, 2)
    begun.param_groups[0]["fused"] = True
    moments, scalars = checkpoint.pack_optimizer(begun)
    _, (fresh,) = trained(2, config, 0)
    before = fresh.param_groups[0]["fused"]
    checkpoint.unpack_optimizer(fresh, moments, scalars)
    assert fresh.param_groups[0]["fused"] == before
    assert not before


def test_a_full_disk_is_told_and_leaves_the_last_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    model, _, header = written(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.safetensors: can't be written"):
            checkpoint.save(path, checkpoint.add_prefix("model", model.state_dict()), header)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
