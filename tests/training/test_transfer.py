"""Runs that begin with another's weights: the same function first, finer patches, more blocks, other classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from export.card.training_record import describe_run, training_commands
from export.source import load_source
from tests.training.commands import RECIPE
from tests.training.data_sets import write_folder
from tests.training.tiny import MODEL, run_config
from training import checkpoint
from training.__main__ import main
from training.checkpoint import CheckpointError, RunConfig
from training.cli import build_parser, choose_preset
from training.config import PRESETS, Preset
from training.metrics_log import read_metrics
from training.model import Perceiver
from training.preprocessing import Preprocess
from training.transfer import (
    check_compatible,
    find_checkpoint,
    load_initial_weights,
    read_origin,
    resample,
    validation_overlap,
)

# Patches of 4 pixels, every 4 or every 2; the scores know where a token stands.
WIDE = {"patch_size": 4, "cross_position_bias": True}
CLOSE = {"patch_size": 2, "patch_overlap": 1, "cross_position_bias": True}


def saved(folder: Path, run: RunConfig, name: str = "best.safetensors") -> tuple[Perceiver, Path]:
    """A model of this configuration with random weights, and its checkpoint."""
    torch.manual_seed(3)
    model = Perceiver(run.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors = checkpoint.add_prefix("model", model.state_dict())
    tensors |= checkpoint.add_prefix("preprocess", Preprocess(run.model.image_size).state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / name, tensors, checkpoint.make_header(run, 7, 70, None, {}))
    return model, folder / name


def begun(path: Path, run: RunConfig) -> Perceiver:
    torch.manual_seed(5)
    model = Perceiver(run.model)
    load_initial_weights(model, run.model_copy(update={"init": read_origin(path)}), [path])
    return model


def test_the_same_model_begins_as_the_same_function(tmp_path: Path) -> None:
    run = run_config(WIDE)
    model, path = saved(tmp_path, run)
    pixels = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(begun(path, run)(pixels), model(pixels), rtol=0, atol=0)


def test_closer_patches_keep_all_but_the_positions_which_are_interpolated(tmp_path: Path) -> None:
    model, path = saved(tmp_path, run_config(WIDE))
    theirs, mine = model.state_dict(), begun(path, run_config(CLOSE)).state_dict()
    moved = {name for name in mine if mine[name].shape != theirs[name].shape}
    assert moved == {"tokens.position_embedding", "cross_attentions.0.position_bias"}
    for name in mine.keys() - moved:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)
    # A square of four close tokens stands where one stood: on the average they say what it said.
    for name, channels_last in (("tokens.position_embedding", True), ("cross_attentions.0.position_bias", False)):
        fine, coarse = (values[name].T if channels_last else values[name] for values in (mine, theirs))
        pooled = torch.nn.functional.avg_pool2d(fine.reshape(1, -1, 4, 4), 2).flatten(2)
        torch.testing.assert_close(pooled.mean(2), coarse.reshape(1, -1, 4).mean(2), rtol=0, atol=1e-5)


def test_more_latents_stand_between_those_there_were(tmp_path: Path) -> None:
    run = run_config(WIDE | {"latent_init": "grid"})
    model, path = saved(tmp_path, run)
    theirs, mine = model.state_dict(), begun(path, run_config(WIDE | {"latent_init": "grid", "num_latents": 16}))
    assert mine(torch.randn(4, 3, 8, 8)).shape == (4, 3)
    fine = mine.state_dict()
    moved = {name for name in fine if fine[name].shape != theirs[name].shape}
    assert moved == {"latents", "cross_attentions.0.position_bias"}
    # A square of four stands where one stood: on the average they begin as it did, and look where it looked.
    for name in moved:
        pooled = torch.nn.functional.avg_pool2d(fine[name].movedim(-2, -1).reshape(1, -1, 4, 4), 2).flatten(2)
        expected = theirs[name].movedim(-2, -1).reshape(1, -1, 4)
        torch.testing.assert_close(pooled.mean(2), expected.mean(2), rtol=0, atol=1e-5)
        # And its left half stands left of its right half.
        rows = pooled.view(1, -1, 2, 2), expected.view(1, -1, 2, 2)
        steps = [row[..., 1].mean(-1) - row[..., 0].mean(-1) for row in rows]
        assert bool((steps[0] * steps[1] >= 0).all())
    others = [name for name in fine if name not in moved]
    for name in others:
        torch.testing.assert_close(fine[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("sharing", ["all", "none"])
def test_more_blocks_begin_as_the_same_function_and_learn(tmp_path: Path, sharing: str) -> None:
    wide = WIDE | {"sharing": sharing, "bias": True}
    model, path = saved(tmp_path, run_config(wide | {"num_blocks": 1}))
    run = run_config(wide | {"num_blocks": 3})
    mine = begun(path, run)
    pixels = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(mine(pixels), model(pixels), rtol=0, atol=0)
    # They are no dead ends: a step moves their output layers, and by these all the rest.
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        mine(pixels).square().mean().backward()
        optimizer.step()
    new = [name for name in before if name.startswith("transformers.") and name.split(".")[2] != "0"]
    moved = [name for name in new if not torch.equal(before[name], mine.state_dict()[name])]
    # A bias of keys adds the same to all scores of a query, which the softmax takes away.
    assert set(new) - set(moved) <= {name for name in new if name.endswith("key.bias")}
    assert len(new) == len(mine.transformers) * 2 * 16


@pytest.mark.parametrize(("side", "new_side"), [(2, 4), (4, 2), (3, 5)])
def test_what_is_even_stays_and_what_rises_rises(side: int, new_side: int) -> None:
    even = torch.full((2, 3, side**2), 1.5)
    torch.testing.assert_close(resample(even, new_side**2), torch.full((2, 3, new_side**2), 1.5))
    rising = torch.arange(side, dtype=torch.float32).repeat(side)[None]  # from left to right
    rows = resample(rising, new_side**2).view(new_side, new_side)
    assert bool((rows.diff(dim=1) > 0).all())
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))


def test_other_labels_get_a_fresh_head(tmp_path: Path) -> None:
    run = run_config(WIDE)
    model, path = saved(tmp_path, run)
    other = run.model_copy(update={"labels": ("dog", "elk"), "model": run.model.model_copy(update={"num_classes": 2})})
    mine, theirs = begun(path, other).state_dict(), model.state_dict()
    torch.manual_seed(5)
    fresh = Perceiver(other.model).state_dict()
    for name in mine:
        expected = fresh if name.startswith("head.") else theirs
        torch.testing.assert_close(mine[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32, "num_latents": 9}, "it could with --dim 16 --num-latents 4."),
        ({"dim": 32, "patch_overlap": 1}, "it could with --dim 16 --patch-overlap 0."),
        ({"dim": 32, "patch_size": 2, "patch_overlap": 1}, "it could with --dim 16 --patch-size 4 --patch-overlap 0."),
        ({"bias": False}, "it could with --bias."),
        ({"cross_position_bias": True}, "it could with --no-cross-position-bias."),
        ({"sharing": "none"}, "it could with --sharing all."),
        ({"num_latents": 9}, "it could with --num-latents 4."),
        ({"num_blocks": 0}, "it could with --num-blocks 1."),
        ({"patch_overlap": 1}, r"its patches reach over 4 pixels, and this model's over 6: patch_size \+ 2"),
    ],
)
def test_another_architecture_is_refused_with_the_flags_that_would_fit(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    _, path = saved(tmp_path, run_config({"patch_size": 4}))
    with pytest.raises(CheckpointError, match=message):
        check_compatible(path, read_origin(path).run.model, run_config({"patch_size": 4} | change).model)


def test_what_decides_nothing_of_the_other_may_differ(tmp_path: Path) -> None:
    """Of one iteration that it shares weights, of no block its heads: their flags would be refused as well."""
    least = {"num_iterations": 1, "num_blocks": 0}
    model, path = saved(tmp_path, run_config(least))
    other = run_config(least | {"sharing": "none", "self_heads": 1, "num_blocks": 1})
    check_compatible(path, read_origin(path).run.model, other.model)
    pixels = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(begun(path, other)(pixels), model(pixels), rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"it could with --num-iterations 1\.$"):
        check_compatible(path, read_origin(path).run.model, run_config({"num_iterations": 2, "sharing": "none"}).model)


def test_fourier_features_of_another_grid_are_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path, run_config(WIDE | {"position": "fourier"}))
    with pytest.raises(CheckpointError, match=r"Fourier features are of a grid of 2 x 2 patches, .* of 4 x 4"):
        check_compatible(path, read_origin(path).run.model, run_config(CLOSE | {"position": "fourier"}).model)


def test_the_flags_that_would_fit_fit_together(tmp_path: Path) -> None:
    _, path = saved(tmp_path, run_config())
    grid = run_config({"latent_init": "grid", "cross_position_bias": True}).model
    with pytest.raises(CheckpointError, match=r"--no-cross-position-bias --latent-init normal\.$"):
        check_compatible(path, read_origin(path).run.model, grid)


def test_a_checkpoint_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    run = run_config()
    _, path = saved(tmp_path, run)
    run = run.model_copy(update={"init": read_origin(path)})
    saved(tmp_path, run_config(epochs=4))
    with pytest.raises(CheckpointError, match="has changed since this run was prepared"):
        load_initial_weights(Perceiver(run.model), run, [path])


def test_checkpoints_are_found_in_runs_and_model_folders(tmp_path: Path) -> None:
    _, best = saved(tmp_path / "run", run_config())
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(best) == best
    for version in (2, 10):
        saved(tmp_path / "models" / str(version), run_config(), "checkpoint.safetensors")
    newest = tmp_path / "models" / "10" / "checkpoint.safetensors"
    for no_version in ("011", "\N{ARABIC-INDIC DIGIT NINE}\N{ARABIC-INDIC DIGIT NINE}"):
        saved(tmp_path / "models" / no_version, run_config(), "checkpoint.safetensors")
    (tmp_path / "models" / "12").write_text("a file")
    assert find_checkpoint(tmp_path / "models") == find_checkpoint(tmp_path / "models" / "10") == newest
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: holds no checkpoint; name a run's folder, a model folder"):
        find_checkpoint(tmp_path / "empty")


# --- the command


@pytest.mark.usefixtures("without_figures")
def test_what_a_user_should_know_of_another_grid_or_other_images_is_told(
    tmp_path: Path, whole: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = Path(shutil.copytree(image_dir, tmp_path / "grown"))
    (image,) = (grown / "train" / "ant").glob("000.png")
    flags = [*RECIPE, "--epochs=1", "--init", str(whole)]
    assert main([*flags, "--data", str(image_dir), "--out", str(tmp_path / "same")]) == 0
    assert "warning:" not in capsys.readouterr().out
    shutil.copyfile(image, image.with_name("more.png"))
    closer = ["--patch-size=2", "--patch-overlap=3", "--num-latents=16"]
    assert main([*flags, *closer, "--data", str(grown), "--out", str(tmp_path / "other")]) == 0
    told = capsys.readouterr().out
    assert "warning: the images are not those of the run that --init or --teacher names" in told
    assert "warning: positions are interpolated from a grid of 2 x 2 patches to one of 4 x 4." in told
    assert "warning: 16 latents are interpolated from a grid of 4." in told


@pytest.mark.usefixtures("without_figures")
def test_other_shares_of_the_same_images_are_told_only_where_they_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    write_folder(folder, {"cat": 20, "dog": 20})
    flags = [*RECIPE, "--epochs=1", "--data", str(folder)]
    assert main([*flags, "--validation-fraction=0.2", "--out", str(tmp_path / "first")]) == 0
    assert "32 training and 8 validation images" in capsys.readouterr().out
    flags += ["--init", str(tmp_path / "first")]
    assert main([*flags, "--validation-fraction=0.1", "--out", str(tmp_path / "fewer")]) == 0
    told = capsys.readouterr().out
    assert "36 training and 4 validation images" in told
    assert "warning:" not in told
    assert main([*flags, "--validation-fraction=0.3", "--out", str(tmp_path / "more")]) == 0
    assert "--validation-fraction 0.2 or less keeps them apart" in capsys.readouterr().out
    # And so in the next generation, which divides as the last one did.
    assert (
        main([*flags[:-1], str(tmp_path / "more"), "--validation-fraction=0.3", "--out", str(tmp_path / "third")]) == 0
    )
    assert "--validation-fraction 0.2 or less keeps them apart" in capsys.readouterr().out
    write_folder(folder, {"cat": 21})
    assert main([*flags, "--validation-fraction=0.1", "--out", str(tmp_path / "others")]) == 0
    assert "warning: the images are not those of the run that --init or --teacher names" in capsys.readouterr().out
    # A class that comes first in the alphabet: others of each class are drawn.
    write_folder(folder, {"ant": 20})
    assert main([*flags, "--validation-fraction=0.2", "--out", str(tmp_path / "wider")]) == 0
    assert "warning: the images are not those of the run that --init or --teacher names" in capsys.readouterr().out


def test_who_may_have_trained_on_what_validates_now(tmp_path: Path) -> None:
    run = run_config().model_copy(update={"pictures_sha256": "1" * 64})
    fraction = run.train.validation_fraction

    def why(mine: dict[str, object], theirs: dict[str, object], *, has_val: bool = False) -> str | None:
        runs = [
            run.model_copy(
                update={
                    "train": run.train.model_copy(update={"validation_fraction": changes.pop("fraction", fraction)})
                }
                | changes
            )
            for changes in (mine, theirs)
        ]
        return validation_overlap(*runs, tmp_path / "nowhere", has_val=has_val)

    other = {"pictures_sha256": "2" * 64}
    unknown = {"pictures_sha256": None}
    assert why({}, {}) is None
    assert why({}, dict(other)) == "images"
    assert why({}, dict(unknown)) is None
    assert why({"fraction": 0.3}, dict(other)) == why({"fraction": 0.3}, dict(unknown)) == "share"
    assert why({"fraction": 0.3}, {}) is None  # of so few images both shares are the same
    assert why({"fraction": 0.3}, dict(unknown), has_val=True) is None
    assert why({"labels": ("ant", "bee", "cat", "dog")}, dict(other)) == "images"
    assert why({"labels": ("x", "y")}, dict(other)) is None
    assert why({"labels": ("ant", "bee", "cat", "dog"), "dataset": "elsewhere"}, dict(other)) is None
    assert why({"fraction": 0.05}, dict(other)) == "images"  # nowhere to look


@pytest.mark.usefixtures("without_figures")
def test_a_share_is_kept_when_resuming_and_refused_beside_given_validation_images(
    tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "images", tmp_path / "run"
    write_folder(folder, {"cat": 20, "dog": 20})
    flags = [*RECIPE, "--validation-fraction=0.3"]
    assert main([*flags, "--data", str(folder), "--out", str(run), "--max-steps=2"]) == 3
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 0
    assert "28 training and 12 validation images" in capsys.readouterr().out
    assert main([*flags, "--data", str(image_dir), "--out", str(tmp_path / "given")]) == 2
    complaint = capsys.readouterr().err
    assert f"--validation-fraction 0.3 changes nothing: {image_dir} has its own val/" in complaint
    assert not (tmp_path / "given").exists()


@pytest.mark.usefixtures("without_figures")
def test_a_run_that_begins_with_another_goes_on_from_its_figures(tmp_path: Path, whole: Path, image_dir: Path) -> None:
    run = tmp_path / "run"
    flags = [*RECIPE, "--epochs=1", "--learning-rate=1e-9", "--adamw-learning-rate=1e-9", "--weight-decay=0"]
    assert main([*flags, "--data", str(image_dir), "--init", str(whole), "--out", str(run)]) == 0
    # Its first epoch has changed next to nothing, so it validates as the best epoch of the other did.
    header = checkpoint.load(whole / "best.safetensors")[1]
    assert header.val is not None
    assert read_metrics(run)[0]["val_loss"] == pytest.approx(header.val.loss, rel=1e-3)
    config = json.loads((run / "config.json").read_text())
    (ancestor,) = config["ancestors"]
    assert config["init"] == ancestor["checkpoint_sha256"] == checkpoint.digest(whole / "best.safetensors")
    assert (ancestor["epoch"], ancestor["run"]["preset"]) == (header.epoch, "compact")
    # And it is resumed as any other, without the one that it began with.
    shutil.copytree(run, tmp_path / "again")
    assert main(["--resume", str(tmp_path / "again")]) == 0


def test_the_model_is_that_of_the_initial_weights_but_for_flags(whole: Path) -> None:
    theirs = checkpoint.load(whole / "best.safetensors")[1].run
    for flags, changes in (([], {}), (["--num-blocks=2", "--drop-path=0.1"], {"num_blocks": 2, "drop_path": 0.1})):
        args = build_parser().parse_args(["--init", str(whole), *flags])
        preset = choose_preset(args)
        assert preset is not None
        assert preset.model == theirs.model.model_copy(update=changes)
        assert (args.preset, preset.train) == (theirs.preset, PRESETS[theirs.preset].train)
    # A preset beside it is the recipe alone.
    preset = choose_preset(build_parser().parse_args(["--init", str(whole), "--preset=reference"]))
    assert preset == Preset(model=theirs.model, train=PRESETS["reference"].train)


def test_what_can_not_be_begun_with_is_told_before_anything_is_written(
    tmp_path: Path, whole: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [*RECIPE, "--data", str(image_dir), "--out", str(run)]
    assert main([*flags, "--init", str(whole), "--token-dim=32"]) == 2
    assert f"it could with --token-dim {MODEL['token_dim']}." in capsys.readouterr().err
    assert main([*flags, "--init", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such checkpoint" in capsys.readouterr().err
    assert main(["--resume", str(whole), "--init", str(whole)]) == 2
    assert "leave out --init" in capsys.readouterr().err
    assert not run.exists()


def test_several_models_give_the_mean_of_their_weights(tmp_path: Path) -> None:
    run = run_config(WIDE)
    one, path = saved(tmp_path / "one", run)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1.0)
    tensors, header = checkpoint.load(path)
    other = tmp_path / "other.safetensors"
    checkpoint.save(other, tensors | checkpoint.add_prefix("model", one.state_dict()), header)
    origins = [read_origin(each) for each in (path, other)]
    mean = Perceiver(run.model)
    begins = run.model_copy(update={"init": origins[0], "averaged": (origins[1],)})
    load_initial_weights(mean, begins, [path, other])
    for name, weights in checkpoint.strip_prefix("model", tensors).items():
        torch.testing.assert_close(mean.state_dict()[name], (weights + one.state_dict()[name]) / 2)
    # Its draws are its own, and its lineage is theirs.
    assert begins.draw_seed != run.model_copy(update={"init": origins[0]}).draw_seed
    assert begins.ancestry() == tuple(origins)


@pytest.mark.usefixtures("without_figures")
def test_the_mean_of_models_is_reported_as_it_is(tmp_path: Path, whole: Path, image_dir: Path) -> None:
    flags = [*RECIPE, "--data", str(image_dir)]
    other = tmp_path / "other"
    assert main([*flags, "--init", str(whole), "--out", str(other)]) == 0
    mean = tmp_path / "mean"
    assert main([*flags, "--init", str(whole), str(other), "--epochs=0", "--out", str(mean)]) == 0
    one, two, both = (checkpoint.load(folder / "best.safetensors")[0] for folder in (whole, other, mean))
    for name, weights in checkpoint.strip_prefix("model", both).items():
        torch.testing.assert_close(weights, (one[f"model.{name}"] + two[f"model.{name}"]) / 2)
    report = json.loads((mean / "report.json").read_text())
    assert report["epoch"] == 0
    assert report["val"]["n"] == checkpoint.load(mean / "best.safetensors")[1].val.n
    source = load_source(mean)
    assert describe_run(source).startswith("The mean of the weights of 2 models, which the commands before the last")
    assert "--init runs/stage-1 runs/stage-2" in list(training_commands(source))[-1]
    assert "--epochs 0" in list(training_commands(source))[-1]


def test_what_can_not_be_averaged_is_refused(
    tmp_path: Path, whole: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]
    assert main([*flags, "--epochs=0"]) == 2
    assert "--epochs 0 trains nothing: name the weights that are reported with --init" in capsys.readouterr().err
    tensors, header = checkpoint.load(whole / "best.safetensors")
    others = tuple(f"other {label}" for label in header.run.labels)
    other = tmp_path / "other.safetensors"
    run = header.run.model_copy(update={"labels": others})
    checkpoint.save(other, tensors, header.model_copy(update={"run": run}))
    assert main([*flags, "--init", str(whole), str(other)]) == 2
    assert f"{other}: tells other classes than {whole}; the mean of weights is of models" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
