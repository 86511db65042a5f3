"""What all tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.commands import RECIPE
from tests.training.tiny import write_pictures
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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny pictures of three classes; copy it before changing anything."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run that nobody disturbed; copy it as well."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*RECIPE, "--data", str(pictures), "--out", str(run)]) == 0
    return run
