"""Flags: one for each field, refused in a sentence before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from training.__main__ import main
from training.cli import NOT_FLAGS, build_parser, choose_preset
from training.config import PRESETS, ModelConfig, Preset, TrainConfig


def preset_of(*flags: str) -> Preset:
    preset = choose_preset(build_parser().parse_args(flags))
    assert preset is not None
    return preset


def test_the_compact_preset_is_the_default() -> None:
    assert preset_of() == PRESETS["compact"]
    assert preset_of("--preset", "reference") == PRESETS["reference"]


def test_flags_change_the_preset() -> None:
    preset = preset_of(
        "--preset=reference", "--dim=64", "--no-flip", "--cross-output", "--schedule=cosine", "--zoom=0.1"
    )
    reference = PRESETS["reference"]
    changes = {"flip": False, "schedule": "cosine", "zoom": 0.1}
    assert preset.train == reference.train.model_copy(update=changes)
    assert preset.model == reference.model.model_copy(update={"dim": 64, "cross_output": True})


def test_every_field_is_a_flag_with_a_help_text() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    for model in (ModelConfig, TrainConfig):
        for name in set(model.model_fields) - NOT_FLAGS:
            assert f"--{name.replace('_', '-')}" in actions[name].option_strings
    assert all(action.help for action in actions.values())
    assert "num_classes" not in actions


def test_help_is_readable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m training [--preset NAME] [--data DIR] [--out RUN] [flags]\n")
    assert max(map(len, text.splitlines())) <= 100
    assert "--resume RUN" in text
    assert ", ".join(PRESETS) in " ".join(text.split())
    assert "Exit status: 0 done" in text


BAD_FLAGS = {
    "unknown preset": (
        ["--preset", "huge"],
        "--preset huge: there is no such preset; there are reference, compact, teacher, photo, accurate.",
    ),
    "latents of a residual network": (
        ["--preset", "teacher", "--num-latents", "9"],
        "a residual network has no use for --num-latents: leave it out, or train another preset.",
    ),
    "latents of a residual network, as many as by default": (
        ["--preset", "teacher", "--num-latents", "32", "--drop-path", "0"],
        "a residual network has no use for --num-latents, --drop-path: leave it out",
    ),
    "a Perceiver that becomes a residual network": (
        ["--preset", "compact", "--network", "residual"],
        "a residual network has no patch_overlap, num_latents",
    ),
    "pixels too few to halve": (
        ["--preset", "teacher", "--input-size", "4", "--image-size", "4", "--crop-padding", "1"],
        "of 4 pixels one is left: set image_size 5, or more",
    ),
    "out of range": (["--batch-size", "0"], "--batch-size 0: Input should be greater than or equal to 1."),
    "not finite": (["--learning-rate", "inf"], "--learning-rate inf: Input should be a finite number."),
    "patches": (["--image-size", "30"], "image_size 30 is no multiple of patch_size 4"),
    "crop": (["--crop-padding", "32"], "crop_padding 32 moves images of 32 pixels out of sight: at most 31"),
    "distillation without a teacher": (["--distillation", "0.5"], "name one with --teacher, or with --init."),
    "a temperature of nothing": (
        ["--distillation-temperature", "4"],
        "--distillation-temperature 4.0 changes nothing without --distillation.",
    ),
    "a rate of no optimiser": (
        ["--preset", "reference", "--adamw-learning-rate", "0.01"],
        "--adamw-learning-rate 0.01 changes nothing without --optimizer muon.",
    ),
    "a warm-up of none": (
        ["--preset", "reference", "--warmup-epochs", "2"],
        "--warmup-epochs 2.0 changes nothing with --schedule plateau.",
    ),
    "a plateau on a line": (["--plateau-patience", "5"], "--plateau-patience 5 changes nothing without --schedule"),
    "a share of no mix": (
        ["--cutmix", "0", "--mix-probability", "0.9"],
        "changes nothing without --mixup or --cutmix.",
    ),
    "a mix of no batch": (
        ["--mixup", "0.5", "--mix-probability", "0"],
        "--mixup 0.5 changes nothing with --mix-probability 0.",
    ),
    "a decay of nothing": (
        ["--decay-all", "--weight-decay", "0"],
        "--decay-all changes nothing with --weight-decay 0.",
    ),
    "smooth labels that nobody reads": (
        ["--label-smoothing", "0.2", "--distillation", "1", "--teacher", "run"],
        "--label-smoothing 0.2 changes nothing with --distillation 1.",
    ),
    "weights that one iteration shares": (
        ["--sharing", "all", "--num-iterations", "1"],
        "--sharing all changes nothing with --num-iterations 1.",
    ),
    "heads of no block": (
        ["--num-blocks", "0", "--self-heads", "2"],
        "--self-heads 2 changes nothing with --num-blocks 0.",
    ),
    "latents drawn for nothing": (
        ["--init", "run", "--latent-std", "0.1"],
        "--latent-std 0.1 changes nothing with --init, which has latents.",
    ),
    "frequencies of nothing": (["--fourier-bands", "4"], "--fourier-bands 4 changes nothing with --position learned."),
    "a path that is not there": (
        ["--num-blocks", "0", "--drop-path", "0.1"],
        "--drop-path 0.1 changes nothing with --num-blocks 0.",
    ),
    "images that would be shrunk": (
        ["--input-size", "64"],
        "--input-size 64 would be shrunk again, without filtering, to --image-size 32, which the model sees",
    ),
    "resume and a flag": (["--resume", "run", "--dim", "3"], "--resume goes on with the run as it was configured"),
    "resume and out": (["--resume", "run", "--preset", "compact", "--out", "x"], "leave out --preset, --out, or start"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_flags_that_do_not_fit_are_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_flags_that_belong_together_are_taken_together() -> None:
    assert preset_of("--mixup=0.2", "--cutmix=0", "--mix-probability=0.9").train.mix_probability == 0.9
    assert preset_of("--schedule=plateau", "--plateau-patience=5").train.plateau_patience == 5
    assert preset_of("--preset=reference", "--schedule=linear", "--warmup-epochs=2").train.warmup_epochs == 2
    assert preset_of("--position=both", "--fourier-bands=4").model.fourier_bands == 4
    # What a preset has of them stays without a word.
    assert preset_of("--optimizer=adamw").train.adamw_learning_rate == PRESETS["compact"].train.adamw_learning_rate


UNPARSABLE = {
    "a word for a number": (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    "a wrong choice": (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
    "an unknown flag": (["--wings", "2"], "unrecognized arguments: --wings 2"),
    "no abbreviations": (["--epoch", "2"], "unrecognized arguments: --epoch 2"),
    "no threads": (["--threads", "0"], "argument --threads: 0 is not a whole number from 1"),
    "negative minutes": (["--max-minutes", "-1"], "argument --max-minutes: -1 is not a number above 0"),
    "endless minutes": (["--max-minutes", "nan"], "argument --max-minutes: nan is not a number above 0"),
    "no steps": (["--max-steps", "0"], "argument --max-steps: 0 is not a whole number from 1"),
}


@pytest.mark.parametrize(("flags", "message"), UNPARSABLE.values(), ids=UNPARSABLE.keys())
def test_flags_that_cannot_be_read(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_flags_cost_no_import_of_torch() -> None:
    code = (
        "import sys; from training.__main__ import main; "
        "status = main(['--preset', 'huge']); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "2 False\n"
