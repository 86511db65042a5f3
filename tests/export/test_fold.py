"""The folded form is the trained function for random configurations; each choice of attention is the cheaper one."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.graph.attention import MergedAttention, ProjectedAttention
from export.graph.fold import FoldedBlock, FoldedCrossAttention, fold
from export.graph.trained import TrainedModel, count_flops
from tests.export.conftest import TINY, perturb
from training.config import ModelConfig
from training.model import Perceiver
from training.preprocessing import Preprocess


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Small models of every kind that `training.model` knows."""
    patch, grid = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 4))
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    cross_output = draw(st.booleans())
    position_bias = draw(st.booleans())
    return ModelConfig(
        num_classes=draw(st.integers(2, 5)),
        input_size=draw(st.sampled_from([3, patch * grid, 2 * patch * grid])),
        image_size=patch * grid,
        patch_size=patch,
        patch_overlap=draw(st.integers(0, 2)),
        dim=draw(st.sampled_from([4, 8, 12])) if cross_output else heads * size,
        token_dim=draw(st.sampled_from([4, 6, 12])),
        num_latents=draw(st.sampled_from([1, 4, 9])),
        num_iterations=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(0, 2)),
        sharing=draw(st.sampled_from(["all", "all_but_first_cross", "all_but_first", "none"])),
        position=draw(st.sampled_from(["learned", "fourier", "both"])),
        fourier_bands=draw(st.integers(1, 3)),
        latent_init="grid" if position_bias and draw(st.booleans()) else "normal",
        cross_heads=heads,
        cross_head_dim=size,
        cross_scale=draw(st.sampled_from(["learned", "sqrt"])),
        cross_output=cross_output,
        cross_position_bias=position_bias,
        residual=draw(st.sampled_from(["normalised", "plain"])),
        self_heads=draw(st.integers(1, 3)),
        self_head_dim=draw(st.sampled_from([1, 3, 8])),
        ffn_ratio=draw(st.sampled_from([0.5, 1.0, 3.0])),
        bias=draw(st.booleans()),
        head_hidden=draw(st.booleans()),
        head_norm=draw(st.booleans()),
        test_time_flip=draw(st.booleans()),
        attention_dropout=0.1,
        ffn_dropout=0.2,
        logits_dropout=0.2,
        drop_path=0.1,
    )


def trained_model(config: ModelConfig, seed: int = 0, temperature: float = 1.7) -> TrainedModel:
    torch.manual_seed(seed)
    model = Perceiver(config)
    perturb(model)
    preprocess = Preprocess(config.image_size, mean=(120.0, 115.0, 100.0), variance=(4000.0, 3000.0, 5000.0))
    return TrainedModel(preprocess, model, temperature).eval()


def random_images(config: ModelConfig, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, config.input_size, config.input_size, 3), dtype=torch.uint8)


@settings(max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configurations(), seed=st.integers(0, 1000))
def test_folded_is_the_trained_function(config: ModelConfig, seed: int) -> None:
    trained, images = trained_model(config, seed), random_images(config)
    with torch.inference_mode():
        folded32, trained32 = fold(trained)(images), trained(images)
        trained.double()
        folded64, trained64 = fold(trained)(images), trained(images)
    size = trained64.abs().max().item()
    assert trained64.dtype == torch.float64
    assert (folded64 - trained64).abs().max().item() <= 1e-10 * max(1.0, size)
    assert folded32.dtype == torch.float32
    assert (folded32 - trained32).abs().max().item() <= 1e-4 * max(1.0, size)


@settings(max_examples=30, derandomize=True)
@given(config=configurations())
def test_folding_never_costs_operations(config: ModelConfig) -> None:
    trained, image = trained_model(config), random_images(config, 1)
    # The trained model resizes without a matrix product, the folded one with two.
    side, target, views = config.input_size, config.image_size, 1 + config.test_time_flip
    resize = 2 * 3 * (target * side * side + target * target * side) * views if side != target else 0
    assert count_flops(fold(trained), image) <= count_flops(trained, image) + resize


def wide_heads(**changes: object) -> ModelConfig:
    """Heads as wide as the latents, as in the reference."""
    return TINY.model_copy(update={"cross_heads": 1, "cross_head_dim": 16, "self_head_dim": 16, **changes})


def attentions(config: ModelConfig) -> dict[str, type]:
    folded = fold(trained_model(config))
    return {
        type(module).__name__: type(module.attention)
        for module in folded.modules()
        if isinstance(module, FoldedCrossAttention | FoldedBlock)
    }


def test_wide_heads_are_merged_and_narrow_ones_are_not() -> None:
    assert attentions(wide_heads()) == {"FoldedCrossAttention": MergedAttention, "FoldedBlock": MergedAttention}
    assert attentions(TINY.model_copy(update={"self_head_dim": 2, "num_latents": 16})) == {
        "FoldedCrossAttention": ProjectedAttention,
        "FoldedBlock": ProjectedAttention,
    }


@pytest.mark.parametrize("config", [TINY, wide_heads()], ids=["narrow", "wide"])
def test_the_form_that_was_taken_is_the_cheaper_one(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, image = trained_model(config), random_images(config, 1)
    chosen = count_flops(fold(trained), image)
    counts = []
    for cross, block in itertools.product((ProjectedAttention, MergedAttention), repeat=2):
        kinds = {config.num_tokens: cross, config.num_latents: block}
        monkeypatch.setattr(
            "export.graph.fold.cheaper_attention", lambda weights, work, kinds=kinds: kinds[work.tokens](weights)
        )
        counts.append(count_flops(fold(trained), image))
    assert len(set(counts)) == 4
    assert chosen == min(counts)


def test_the_form_that_was_trained_is_left_as_it_is() -> None:
    trained, images = trained_model(TINY), random_images(TINY)
    with torch.inference_mode():
        before = trained(images)
        fold(trained)
        assert torch.equal(trained(images), before)


def test_a_wrong_weight_is_seen() -> None:
    """The property above can fail: each tensor of the folded form matters."""
    trained, images = trained_model(wide_heads()), random_images(TINY)
    folded = fold(trained)
    with torch.inference_mode():
        expected = folded(images)
        for name, tensor in folded.state_dict().items():
            tensor.mul_(1.5).add_(0.1)
            changed = (folded(images) - expected).abs().max().item()
            tensor.sub_(0.1).div_(1.5)
            assert changed > 1e-4, name
