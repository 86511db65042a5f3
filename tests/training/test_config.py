"""Presets and what configurations refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from training.build_model import build_model
from training.config import PRESETS, ModelConfig, Preset, TrainConfig
from training.network import count_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    preset = PRESETS[name]
    assert Preset.model_validate_json(preset.model_dump_json()) == preset


def test_the_reference_trains_as_the_example_does() -> None:
    train = PRESETS["reference"].train
    assert (train.epochs, train.batch_size, train.weight_decay) == (50, 64, 1e-4)
    assert (train.plateau_factor, train.plateau_patience, train.plateau_threshold) == (0.2, 3, 1e-4)
    assert (train.early_stop_patience, train.best_by) == (15, "loss")
    assert (train.flip, train.zoom, train.label_smoothing, train.crop_padding) == (True, 0.2, 0, 0)
    assert (train.mixup, train.cutmix, train.ema_decay, train.clip_norm) == (0, 0, 0, 0)


def test_no_preset_is_larger_than_ten_million_parameters() -> None:
    counts = {name: count_parameters(build_model(preset.model)) for name, preset in PRESETS.items()}
    assert counts["reference"] == 9_697_637
    assert max(counts.values()) < 10_000_000


REFUSED: list[tuple[type[ModelConfig | TrainConfig], dict[str, Any], str]] = [
    (ModelConfig, {"num_classes": 1}, "greater than or equal to 2"),
    (ModelConfig, {"image_size": 30}, "no multiple of patch_size 4"),
    (
        ModelConfig,
        {"cross_output": False, "cross_heads": 3},
        r"cross_heads \* cross_head_dim \(3 \* 128\) must equal dim",
    ),
    (ModelConfig, {"latent_init": "grid"}, "set cross_position_bias as well"),
    (ModelConfig, {"latent_init": "grid", "cross_position_bias": True}, "not 32: try num_latents 25"),
    (ModelConfig, {"latent_dropout": 0.5, "num_latents": 1}, "leaves out none of num_latents 1"),
    (ModelConfig, {"latent_dropout": 0.01}, "latent_dropout 0.01 leaves out none of num_latents 32"),
    (ModelConfig, {"ffn_ratio": 0.003}, "ffn_ratio 0.003 of dim 128 is no hidden channel"),
    (ModelConfig, {"sharing": "some"}, "'all', 'all_but_first_cross', 'all_but_first' or 'none'"),
    (ModelConfig, {"ffn_ratio": float("inf")}, "finite number"),
    (ModelConfig, {"wings": 2}, "Extra inputs are not permitted"),
    (TrainConfig, {"learning_rate": float("nan")}, "greater than 0|finite number"),
    (TrainConfig, {"label_smoothing": 1}, "less than 1"),
    (TrainConfig, {"seed": 2**32}, "less than 4294967296"),
    (TrainConfig, {"batch_size": 0}, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=[str(fields) for _, fields, _ in REFUSED])
def test_what_does_not_fit_is_refused(
    kind: type[ModelConfig | TrainConfig], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(fields)


def test_a_crop_moves_no_image_out_of_sight() -> None:
    model = ModelConfig(input_size=8, image_size=8)
    assert Preset(model=model, train=TrainConfig(crop_padding=7)).train.crop_padding == 7
    with pytest.raises(ValidationError, match="crop_padding 8 moves images of 8 pixels out of sight: at most 7"):
        Preset(model=model, train=TrainConfig(crop_padding=8))
