"""A model that was changed in training/model.py, and export/graph/fold.py has not followed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from export.__main__ import main
from tests.export.conftest import LABELS
from tests.export.test_errors import fails
from training import checkpoint, model
from training.model import Perceiver, Tokens


def assert_plain_alone_passes(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").unlink()
    arguments = [str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2", "--variants"]
    error = fails(arguments, capsys)
    assert "export/graph/fold.py does not know this model (" in error
    assert "--plain exports the trained form" in error
    assert main([*arguments, "--plain"]) == 0


def test_a_model_that_the_algebra_does_not_know(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(config: Any) -> Perceiver:
        other = Perceiver(config)
        other.head = torch.nn.Sequential(torch.nn.LayerNorm(config.dim), torch.nn.Linear(config.dim, len(LABELS)))
        return other

    monkeypatch.setattr(checkpoint, "build_model", changed)
    tensors, header = checkpoint.load(copy / "best.safetensors")
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.head.")}
    weights |= {f"model.head.{name}": tensor for name, tensor in changed(header.run.model).head.state_dict().items()}
    checkpoint.save(copy / "best.safetensors", weights, header)
    assert_plain_alone_passes(copy, tmp_path, capsys)


def test_a_model_whose_tokens_the_algebra_does_not_know(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is folded without a word, and what comes of it does not run."""

    class WithARegister(Tokens):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            tokens = super().forward(pixels)
            return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)

    monkeypatch.setattr(model, "Tokens", WithARegister)
    assert_plain_alone_passes(copy, tmp_path, capsys)
