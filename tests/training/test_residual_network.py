"""The convolutional teacher: its function, its parameters, its runs, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.commands import RECIPE
from tests.training.runs import RECIPES, assert_same_run, assert_same_tensors, trainer_in
from tests.training.tiny import run_config
from training import checkpoint
from training.__main__ import main
from training.build_model import build_model
from training.checkpoint import CheckpointError
from training.cli import build_parser, choose_preset
from training.config import PRESETS, ModelConfig
from training.network import count_parameters
from training.optim import is_matrix
from training.residual_network import Convolution, ResidualNetwork
from training.transfer import check_compatible, read_origin

RESIDUAL = {"network": "residual", "num_classes": 3, "input_size": 8, "image_size": 8, "dim": 8, "num_blocks": 2}


def residual_run(**train: object) -> Any:
    run = run_config(**train)
    return run.model_copy(update={"model": ModelConfig.model_validate(RESIDUAL), "preset": "teacher"})


@pytest.fixture
def network(seeded: None) -> ResidualNetwork:
    """A network in evaluation whose every number matters, float64."""
    network = build_model(ModelConfig.model_validate(RESIDUAL))
    assert isinstance(network, ResidualNetwork)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(network.head.weight)
    return network.double().eval()


def convolve(x: Tensor, layer: Convolution, stride: int = 1) -> Tensor:
    """A 3 x 3 convolution as a sum over what each of nine places has, [B, C, H, W]."""
    kernels = layer.weight.detach().reshape(len(layer.weight), 3, 3, -1)
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    places = [
        torch.einsum("oc,bchw->bohw", kernels[:, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(places).sum(dim=0)[:, :, ::stride, ::stride]


def normalise(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """With the statistics of training, then ReLU."""
    mean, var, weight, bias = (
        values.detach()[:, None, None] for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)


def test_it_computes_what_the_paper_says(network: ResidualNetwork) -> None:
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x = convolve(pixels, network.stem)
    for i, block in enumerate(network.blocks):
        stride = 2 if i in (2, 4) else 1
        y = normalise(x, block.first_norm)
        branch = convolve(normalise(convolve(y, block.first, stride), block.second_norm), block.second)
        if i in (2, 4):
            x = torch.einsum("oc,bchw->bohw", block.shortcut.weight.detach(), y[:, :, ::2, ::2])
        x = x + branch
    features = normalise(x, network.norm).mean(dim=(2, 3))
    assert features.shape == (2, 32)
    torch.testing.assert_close(network.features_of_view(pixels), features)
    expected = features @ network.head.weight.detach().T + network.head.bias.detach()
    torch.testing.assert_close(network(pixels), expected)


def test_the_teacher_has_the_layers_of_a_wide_network_of_sixteen() -> None:
    network = build_model(PRESETS["teacher"].model)
    convolutions = [module for module in network.modules() if isinstance(module, Convolution)]
    assert len(convolutions) + 3 == 16  # and two shortcuts, and the head
    assert count_parameters(network) == 2_800_036


def test_muon_trains_its_kernels() -> None:
    network = build_model(ModelConfig.model_validate(RESIDUAL))
    matrices = [name for name, values in network.named_parameters() if is_matrix(name, values)]
    assert len(matrices) == 1 + 2 * 6 + 2 + 1


def test_images_of_a_batch_do_not_touch_each_other_in_evaluation(network: ResidualNetwork) -> None:
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(network(pixels)[1:2], network(pixels[1:2]))


@pytest.mark.parametrize("recipe", [RECIPES["adamw"], RECIPES["muon"]], ids=["adamw", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, recipe: dict[str, Any], without_figures: None) -> None:
    run = residual_run(**recipe)
    whole = trainer_in(tmp_path / "whole", run)
    assert whole.fit()
    stopped = trainer_in(tmp_path / "stopped", run)
    assert not stopped.fit(max_steps=7)
    resumed = trainer_in(tmp_path / "stopped", run)
    resumed.resume()
    assert resumed.fit()
    assert_same_run(whole, resumed)


def test_the_statistics_of_its_norms_are_averaged_with_its_weights(tmp_path: Path, without_figures: None) -> None:
    state = trainer_in(tmp_path / "run", residual_run(**RECIPES["adamw"])).state
    mine, theirs = state.evaluated.norm, state.model.norm
    assert mine is not theirs
    state.update_average()  # the first of all, a copy
    for tensor in (theirs.running_mean, theirs.running_var, theirs.weight):
        tensor.data.fill_(5.0)
    with torch.no_grad():
        before = [tensor.clone() for tensor in (mine.running_mean, mine.running_var, mine.weight)]
    state.update_average()  # the second: min(decay, 2 / 11)
    for old, new in zip(before, (mine.running_mean, mine.running_var, mine.weight), strict=True):
        torch.testing.assert_close(new.detach(), old + 9 / 11 * (5 - old))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 16}, "a residual network has no num_latents"),
        ({"drop_path": 0.1, "head_norm": True}, "a residual network has no head_norm, drop_path"),
        ({"num_blocks": 0}, "set num_blocks 1, or more"),
    ],
)
def test_what_it_lacks_is_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(RESIDUAL | changes)


def test_no_other_network_begins_with_its_weights(tmp_path: Path, without_figures: None) -> None:
    trainer_in(tmp_path / "run", residual_run(epochs=1)).fit()
    path = tmp_path / "run" / "best.safetensors"
    theirs = read_origin(path).run.model
    check_compatible(path, theirs, theirs)
    with pytest.raises(ValueError, match="--init takes one residual network"):
        choose_preset(build_parser().parse_args(["--init", str(path), str(path)]))
    with pytest.raises(ValueError, match="--network perceiver: the model of --init is a residual network"):
        choose_preset(build_parser().parse_args(["--init", str(path), "--network", "perceiver"]))
    for changes in ({"num_blocks": 3}, {"dim": 16}, {"network": "perceiver"}):
        mine = ModelConfig.model_validate(RESIDUAL | changes)
        with pytest.raises(CheckpointError, match="this one can't begin with"):
            check_compatible(path, theirs, mine)


def test_a_perceiver_learns_from_it_by_two_commands(
    tmp_path: Path, image_dir: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    small = ["--dim=8", "--num-blocks=1", "--input-size=8", "--image-size=8", "--crop-padding=1", "--precision=float32"]
    machine = ["--epochs=1", "--batch-size=8", "--threads=1", "--device=cpu", "--data", str(image_dir)]
    assert main(["--preset", "teacher", *small, *machine, "--out", str(teacher)]) == 0
    assert f"; it teaches with --distillation 0.7 --teacher {teacher}" in capsys.readouterr().out
    taught = ["--distillation=0.7", "--teacher", str(teacher), "--data", str(image_dir), "--out", str(student)]
    assert main([*RECIPE, *taught]) == 0
    _, header = checkpoint.load(student / "best.safetensors")
    assert header.run.model.network == "perceiver"
    assert [origin.run.model.network for origin in header.run.taught_by] == ["residual"]
    asked = checkpoint.strip_prefix("teacher.0.model", checkpoint.load(student / "last.safetensors")[0])
    best = checkpoint.strip_prefix("model", checkpoint.load(teacher / "best.safetensors")[0])
    assert_same_tensors(asked, best)  # statistics of the norms as well: it only answers
