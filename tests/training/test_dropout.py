"""What a training step leaves out: of the values, of the branches, of the latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import MODEL
from training.config import PRESETS, ModelConfig
from training.model import Perceiver

pytestmark = pytest.mark.usefixtures("seeded")


def perceiver(**changes: object) -> Perceiver:
    """A tiny model with the rates of `reference` unless told otherwise."""
    rates = {"attention_dropout": 0.1, "ffn_dropout": 0.2, "logits_dropout": 0.2}
    return Perceiver(ModelConfig.model_validate(MODEL | rates | changes))


def without_dropout(**changes: object) -> Perceiver:
    return perceiver(**{"attention_dropout": 0, "ffn_dropout": 0, "logits_dropout": 0} | changes)


def assert_dropped(trained: Tensor, evaluated: Tensor, rate: float) -> None:
    """Each value is zero, with probability ``rate``, or the evaluated value over ``1 - rate``."""
    dropped = trained == 0
    assert dropped.double().mean() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / dropped.numel()))
    torch.testing.assert_close(trained[~dropped], evaluated[~dropped] / (1 - rate))


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    model = perceiver(drop_path=0.5, latent_dropout=0.5)
    pixels = torch.randn(3, 3, 8, 8)
    model.eval()
    assert torch.equal(model(pixels), model(pixels))
    model.train()
    assert not torch.equal(model(pixels), model(pixels))


@torch.no_grad()
def test_logits_get_dropout_in_training() -> None:
    model = perceiver(num_classes=500, attention_dropout=0, ffn_dropout=0)
    pixels = torch.randn(4, 3, 8, 8)
    assert_dropped(model.train()(pixels), model.eval()(pixels), 0.2)


@pytest.mark.parametrize(("blocks", "rates"), [(1, [0.4]), (2, [0.0, 0.4]), (3, [0.0, 0.2, 0.4])])
def test_the_last_block_is_dropped_at_the_rate_that_is_set(blocks: int, rates: list[float]) -> None:
    config = PRESETS["compact"].model.model_copy(update={"num_blocks": blocks, "drop_path": 0.4})
    for transformer in Perceiver(config).transformers:
        assert [block.drop_path.rate for block in transformer] == pytest.approx(rates)


@torch.no_grad()
def test_feed_forward_gets_dropout_after_its_last_layer_only() -> None:
    model = perceiver()
    x = torch.randn(20, 5, 16)
    for feed_forward in (model.cross_attentions[0].ffn, model.transformers[0][0].ffn):
        assert_dropped(feed_forward.train()(x), feed_forward.eval()(x), 0.2)


@torch.no_grad()
def test_cross_attention_weights_get_dropout() -> None:
    # A single token's weight is 1, so that a dropped weight leaves a row of zeros.
    cross = perceiver(cross_heads=1, cross_head_dim=16).cross_attentions[0]
    queries, token = torch.randn(400, 5, 16), torch.randn(400, 1, 16)
    trained, evaluated = cross.train().read(queries, token), cross.eval().read(queries, token)
    rows_dropped = (trained == 0).all(dim=-1)
    assert torch.equal(rows_dropped, (trained == 0).any(dim=-1))
    assert_dropped(trained[..., 0], evaluated[..., 0], 0.1)


@torch.no_grad()
def test_self_attention_weights_get_dropout() -> None:
    attention = perceiver().transformers[0][0].attention
    # Without the output projection each head's channels are seen as they are.
    attention.output = nn.Identity()
    x = torch.randn(400, 1, 16)
    trained = attention.train()(x).unflatten(-1, (2, 8))
    evaluated = attention.eval()(x).unflatten(-1, (2, 8))
    assert_dropped(trained[..., 0], evaluated[..., 0], 0.1)


# --- latents


@torch.no_grad()
@pytest.mark.parametrize("position_bias", [False, True])
@pytest.mark.parametrize("kept", [[2], [5, 0, 3]])
def test_a_step_is_one_of_the_model_that_has_the_kept_latents_only(
    kept: list[int], position_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_dropout(num_latents=6, latent_dropout=0.5, cross_position_bias=position_bias)
    small = without_dropout(num_latents=len(kept), cross_position_bias=position_bias)
    for parameter in whole.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    weights = whole.state_dict()
    for name in weights:
        if name == "latents":
            weights[name] = weights[name][kept]
        elif name.endswith("position_bias"):
            weights[name] = weights[name][:, kept]
    small.load_state_dict(weights)
    monkeypatch.setattr(whole, "draw_latents", lambda: torch.tensor(kept))
    pixels = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(whole.train()(pixels), small.eval()(pixels))


@pytest.mark.parametrize(("rate", "count"), [(0.5, 10), (0.24, 15), (0.999, 1)])
def test_each_step_draws_latents_anew_and_each_of_them_as_often(rate: float, count: int) -> None:
    model = perceiver(num_latents=20, latent_dropout=rate).train()
    draws = []
    for _ in range(2000):
        kept = model.draw_latents()
        assert kept is not None
        assert len(set(kept.tolist())) == len(kept) == count
        draws.append(kept)
    share = count / 20
    times = torch.bincount(torch.cat(draws), minlength=20) / 2000
    assert (times - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 2000)


def test_evaluation_and_a_rate_of_zero_keep_all_latents() -> None:
    assert perceiver(latent_dropout=0.5).eval().draw_latents() is None
    assert perceiver().train().draw_latents() is None


def test_latents_left_out_get_no_gradient() -> None:
    model = without_dropout(num_latents=6, latent_dropout=0.5, cross_position_bias=True).train()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for gradient in (model.latents.grad, model.cross_attentions[0].position_bias.grad.transpose(0, 1)):
        assert (gradient.flatten(1) != 0).any(dim=1).sum() == 3
