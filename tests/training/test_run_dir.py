"""Which folders may become a run's: none that holds what its owner would miss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.commands import RECIPE
from tests.training.tiny import run_config
from training.__main__ import main
from training.run_dir import lock_run_dir

CONFIG = run_config().model_dump_json()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        # Its last.safetensors was removed, which is several times as large.
        ({"config.json": CONFIG, "best.safetensors": ""}, "holds the weights of a run, best.safetensors: export it"),
        ({"best.safetensors": ""}, "holds the weights of a run, best.safetensors: export it"),
        ({"config.json": '{"architectures": ["BertModel"]}', "model.safetensors": ""}, "run: holds other files"),
        ({"config.json": "", "thesis.tex": ""}, "run: holds other files"),
    ],
)
def test_nothing_that_somebody_has_is_overwritten(
    tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], message: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).write_text(content)
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_text() for path in run.iterdir()} == files


def test_a_run_without_a_checkpoint_begins_again_where_it_was(tmp_path: Path, image_dir: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(CONFIG)
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run), "--max-steps=1"]) == 3
    assert (run / "config.json").read_text() != CONFIG


def test_a_folder_that_can_not_be_written_to_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run_dir.os.access", lambda folder, mode: False)  # whoever is root may write anywhere
    with pytest.raises(ValueError, match="run: can't be written to; go on with a copy"), lock_run_dir(tmp_path / "run"):
        pass
