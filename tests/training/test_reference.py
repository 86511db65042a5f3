"""The `reference` preset against the independent NumPy implementation, and what the example starts from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training import reference_numpy as reference
from training.config import PRESETS, ModelConfig
from training.model import Perceiver
from training.network import count_parameters
from training.preprocessing import Preprocess

pytestmark = pytest.mark.usefixtures("seeded")
REFERENCE = PRESETS["reference"].model
SMALL = {
    "num_classes": 7,
    "input_size": 6,
    "image_size": 12,
    "patch_size": 2,
    "dim": 16,
    "token_dim": 16,
    "num_latents": 5,
    "num_blocks": 2,
    "cross_head_dim": 16,
    "self_heads": 3,
    "self_head_dim": 16,
}
VARIANTS = {
    "as it is": {},
    "one iteration": {"num_iterations": 1},
    "three iterations": {"num_iterations": 3},
    "one block": {"num_blocks": 1},
    "one head": {"self_heads": 1},
    "no resize": {"image_size": 6},
    "uneven resize": {"image_size": 10},
    "shrinking": {"input_size": 20},
    "larger patches": {"patch_size": 4},
    "small heads": {"self_head_dim": 4},
    "more latents than tokens": {"num_latents": 50},
}


def small(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**REFERENCE.model_dump(), **SMALL, **changes})


def shape_of(config: ModelConfig) -> reference.Shape:
    return reference.Shape(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_heads=config.self_heads,
        num_blocks=config.num_blocks,
        num_iterations=config.num_iterations,
    )


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every value that starts at a constant, so that no use of it can be missing or doubled unseen."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))


class Pair:
    """A torch model with random weights and the same parameters by the reference's names."""

    def __init__(self, config: ModelConfig) -> None:
        self.shape = shape_of(config)
        self.model = Perceiver(config).eval().double()
        self.preprocess = Preprocess(config.image_size, (129.3, 124.1, 112.4), (4659.0, 4281.0, 4986.0)).double()
        perturb(self.model)
        state = self.model.state_dict() | {f"preprocess.{k}": v for k, v in self.preprocess.state_dict().items()}
        self.params = reference.from_torch({k: v.numpy() for k, v in state.items()}, config.num_blocks)

    @torch.no_grad()
    def logits(self, images: Tensor, dtype: torch.dtype) -> np.ndarray:
        return self.model.to(dtype)(self.preprocess.to(dtype)(images)).double().numpy()


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def assert_agree(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within ``tolerance`` of each other, and not for want of anything to compare."""
    assert actual.shape == expected.shape
    assert expected.std() > 0.1
    assert np.abs(actual - expected).max() < tolerance


# --- the whole function


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_small_models_agree(changes: dict[str, int]) -> None:
    config = small(**changes)
    pair = Pair(config)
    images = random_images(3, config.input_size)
    expected = reference.forward(pair.params, images.numpy(), pair.shape)
    assert_agree(pair.logits(images, torch.float64), expected, 1e-5)
    assert_agree(pair.logits(images, torch.float32), expected, 1e-4)


def test_the_preset_at_its_full_size_agrees() -> None:
    torch.set_num_threads(2)
    pair = Pair(REFERENCE)
    images = random_images(1, 32)
    expected = reference.forward(pair.params, images.numpy(), pair.shape)
    assert_agree(pair.logits(images, torch.float64), expected, 1e-5)
    assert_agree(pair.logits(images, torch.float32), expected, 1e-4)


def test_every_parameter_matters() -> None:
    """The comparison above would see a change in any single parameter array."""
    pair = Pair(small())
    images = random_images(3, 6).numpy()
    before = reference.forward(pair.params, images, pair.shape)
    # A constant added to all scores of a row is nothing to softmax: the keys' biases cancel, exactly.
    cancelling = {name for name in pair.params if name.endswith("key.bias")}
    for name, value in pair.params.items():
        after = reference.forward(pair.params | {name: value * 1.5 + 0.1}, images, pair.shape)
        assert (np.abs(after - before).max() < 1e-9) == (name in cancelling), name


# --- each part


def test_resize_keeps_half_pixel_centres() -> None:
    line = torch.tensor([0, 100], dtype=torch.uint8).expand(1, 2, 2)[..., None].expand(1, 2, 2, 3)
    pixels = Preprocess(4, (0.0,) * 3, (1.0,) * 3)(line)
    assert pixels[0, 0, 0].tolist() == [0.0, 25.0, 75.0, 100.0]
    assert reference.resize(line.double().numpy(), 4)[0, 0, :, 0].tolist() == [0.0, 25.0, 75.0, 100.0]


@pytest.mark.parametrize(("size", "target"), [(32, 64), (32, 48), (7, 10), (9, 9), (20, 6), (1, 4)])
def test_preprocessing_agrees(size: int, target: int) -> None:
    params = {"input.mean": np.array([129.3, 124.1, 112.4]), "input.variance": np.array([4659.0, 4281.0, 4986.0])}
    preprocess = Preprocess(target).double()
    preprocess.mean.copy_(torch.from_numpy(params["input.mean"]))
    preprocess.variance.copy_(torch.from_numpy(params["input.variance"]))
    images = random_images(3, size)
    actual = preprocess(images).permute(0, 2, 3, 1).numpy()
    expected = reference.resize(reference.normalise(params, images.numpy()), target)
    assert_agree(actual, expected, 1e-12)


def test_mean_and_variance_are_those_of_all_images() -> None:
    images = random_images(50, 6) // torch.tensor([1, 2, 3], dtype=torch.uint8)
    preprocess = Preprocess(6)
    preprocess.fit(images, chunk=7)
    pixels = images.numpy().astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(preprocess.mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(preprocess.variance, pixels.var(axis=0), rtol=1e-6)


def test_patches_are_row_major_and_flattened_as_row_column_channel() -> None:
    model = Perceiver(small(image_size=4, patch_size=2))
    # Pixel values tell their place: 100 * row + 10 * column + channel.
    row, column, channel = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(3), indexing="ij")
    pixels = (100 * row + 10 * column + channel)[None].double()
    patches = model.tokens.patches(pixels.permute(0, 3, 1, 2))
    assert patches[0, 1].tolist() == [20, 21, 22, 30, 31, 32, 120, 121, 122, 130, 131, 132]
    assert patches[0, 2].tolist() == [200, 201, 202, 210, 211, 212, 300, 301, 302, 310, 311, 312]
    np.testing.assert_array_equal(patches, reference.patches(pixels.numpy(), 2))


@torch.no_grad()
def test_tokens_agree() -> None:
    pair = Pair(small())
    images = random_images(3, 6)
    expected = reference.tokens(pair.params, pair.shape, images.numpy())
    assert_agree(pair.model.tokens(pair.preprocess(images)).numpy(), expected, 1e-10)


@torch.no_grad()
def test_cross_attention_agrees() -> None:
    pair = Pair(small())
    latents, tokens = torch.randn(3, 5, 16).double(), torch.randn(3, 36, 16).double()
    expected = reference.cross_attention(pair.params, latents.numpy(), tokens.numpy())
    assert_agree(pair.model.cross_attentions[0](latents, tokens).numpy(), expected, 1e-10)


@torch.no_grad()
def test_self_attention_block_and_feed_forward_agree() -> None:
    pair = Pair(small())
    x = torch.randn(3, 5, 16).double()
    block = pair.model.transformers[0][1]
    expected = reference.self_attention(pair.params, "block1", x.numpy(), pair.shape.num_heads)
    assert_agree(block.attention(x).numpy(), expected, 1e-10)
    assert_agree(block.ffn(x).numpy(), reference.feed_forward(pair.params, "block1.ffn", x.numpy()), 1e-10)
    assert_agree(block(x).numpy(), reference.block(pair.params, "block1", x.numpy(), pair.shape.num_heads), 1e-10)


@torch.no_grad()
def test_head_agrees() -> None:
    pair = Pair(small())
    x = torch.randn(3, 5, 16).double()
    assert_agree(
        pair.model.head(pair.model.head_norm(x).mean(dim=1)).numpy(), reference.head(pair.params, x.numpy()), 1e-10
    )


# --- size and initial values


@pytest.fixture(scope="module")
def initial() -> Perceiver:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Perceiver(REFERENCE)


def test_the_preset_has_as_many_parameters_as_the_example(initial: Perceiver) -> None:
    assert count_parameters(initial) == 9_697_637


def assert_uniform(values: Tensor, bound: float) -> None:
    """Uniform on -bound..bound: extent, mean, variance, and half of it in the inner half."""
    sampling = 5 / math.sqrt(values.numel())  # five standard deviations of a mean of values of deviation 1
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert abs(values.mean()) < bound * sampling
    assert values.var() == pytest.approx(bound**2 / 3, rel=sampling)
    assert (values.abs() < bound / 2).double().mean() == pytest.approx(0.5, abs=sampling)


def glorot(shape: tuple[int, ...]) -> float:
    """The bound of Keras' Glorot uniform for a kernel, by its rule of 2021: all but the last two axes are a field."""
    field = math.prod(shape[:-2])
    return math.sqrt(6 / (field * shape[-2] + field * shape[-1]))


def test_dense_layers_start_glorot_uniform_without_bias(initial: Perceiver) -> None:
    dense_layers = {name: module for name, module in initial.named_modules() if isinstance(module, nn.Linear)}
    assert len(dense_layers) == 1 + 5 + 4 * 6 + 2  # patch, cross-attention, blocks, head
    for name, layer in dense_layers.items():
        kernel: tuple[int, ...] = (layer.in_features, layer.out_features)
        if ".attention." in name:  # Keras' multi-head attention: 256 channels, 8 heads of 256
            kernel = (8, 256, 256) if name.endswith("output") else (256, 8, 256)
        assert_uniform(layer.weight.detach(), glorot(kernel))
        assert not layer.bias.any()
    assert glorot((256, 8, 256)) == pytest.approx(0.0094, rel=0.01)
    assert glorot((8, 256, 256)) == pytest.approx(0.0383, rel=0.01)


def test_other_presets_start_all_dense_layers_alike() -> None:
    config = REFERENCE.model_copy(update={"attention_fans": "matrix"})
    for layer in Perceiver(config).transformers[0][0].attention.children():
        assert_uniform(layer.weight.detach(), math.sqrt(6 / (256 + 2048)))


def test_layer_norms_start_at_one_and_zero(initial: Perceiver) -> None:
    norms = [module for module in initial.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 3 + 4 * 2
    for norm in norms:
        assert norm.eps == 1e-6
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_positions_latents_and_scale_start_as_the_example_has_them(initial: Perceiver) -> None:
    assert_uniform(initial.tokens.position_embedding.detach(), 0.05)
    latents = initial.latents.detach().double()
    standard = latents / 0.05
    assert abs(standard.mean()) < 0.02
    assert standard.var() == pytest.approx(1, rel=0.03)
    assert (standard**4).mean() == pytest.approx(3, abs=0.15)  # 1.8 if it were uniform
    assert initial.cross_attentions[0].scale.item() == 1
    assert initial.cross_attentions[0].scale.shape == ()


def test_seed_decides_the_initial_values() -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(Perceiver(small()).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    assert not torch.equal(weights(3)[0], weights(4)[0])
