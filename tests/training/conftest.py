"""What all tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.commands import RECIPE
from tests.training.tiny import write_images
from training.__main__ import main


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Begin with the same random numbers in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figure that is drawn after every epoch and takes longer than the epochs here."""
    monkeypatch.setattr("training.report.save_curves", lambda lines, path, best_by: None)


@pytest.fixture
def without_figures(without_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out those of the report as well, which take longer than the runs here."""
    for name in ("save_answers", "save_confusion", "save_reliability"):
        monkeypatch.setattr(f"training.report.{name}", lambda *_args: None)


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny images of three classes; copy it before changing anything."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, image_dir: Path) -> Path:
    """A run that nobody disturbed; copy it as well."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run)]) == 0
    return run
