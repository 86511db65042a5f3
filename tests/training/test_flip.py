"""The mean over an image and its mirror image, as it is evaluated and not as it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.training.tiny import MODEL
from training.config import ModelConfig
from training.model import Perceiver

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def model() -> Perceiver:
    model = Perceiver(ModelConfig.model_validate(MODEL | {"test_time_flip": True}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def once(model: Perceiver) -> Perceiver:
    """The same weights, asked once."""
    once = Perceiver(ModelConfig.model_validate(MODEL))
    once.load_state_dict(model.state_dict())
    return once.eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 8, 8)


@torch.no_grad()
def test_evaluation_is_the_mean_of_a_image_and_its_mirror_image(
    model: Perceiver, once: Perceiver, pixels: Tensor
) -> None:
    # Each image by itself, its columns written from right to left one by one.
    mirrored = torch.stack([pixels[..., 7 - column] for column in range(8)], dim=-1)
    expected = torch.cat([(once(pixels[i : i + 1]) + once(mirrored[i : i + 1])) / 2 for i in range(5)])
    torch.testing.assert_close(model.eval()(pixels), expected)
    assert not torch.allclose(once(pixels), expected, atol=0.01)


@torch.no_grad()
def test_a_mirrored_image_has_the_same_logits(model: Perceiver, pixels: Tensor) -> None:
    torch.testing.assert_close(model.eval()(pixels.flip(3)), model.eval()(pixels))


@torch.no_grad()
def test_training_sees_a_image_once(model: Perceiver, once: Perceiver, pixels: Tensor) -> None:
    assert torch.equal(model.train()(pixels), once(pixels))
