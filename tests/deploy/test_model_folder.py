"""Model folders as Kubernetes mounts them: names are links, and an update turns one link around.

The kubelet writes the files of a ConfigMap, a Secret or a projected volume into a folder of their own. `..data` points
there, and what is seen at the top points into `..data`. git-sync and KServe's OCI images link the folder itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.process import Process, on_model, started
from tests.end_to_end.test_service_process import post
from tests.fakes import make_model_folder


class Volume:
    """A folder that is written as the kubelet's atomic writer does it.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = 0
        path.mkdir()

    def write(self, models: dict[int, int]) -> None:
        """Replace all that is in it, at once: for each version's number, the version whose model lies there."""
        old = (self.path / "..data").resolve()
        self._number += 1
        new = self.path / f"..2026_01_01_00_00_00.{self._number}"
        for version, model in models.items():
            make_model_folder(self.path.parent / "written", model).rename(self.path.parent / "whole")
            new.mkdir(exist_ok=True)
            (self.path.parent / "whole").rename(new / str(version))
        (self.path / "..data_tmp").symlink_to(new.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for link in self.path.iterdir():
            if link.name.isdigit() and not link.exists():
                link.unlink()
        for version in models:
            if not (self.path / str(version)).is_symlink():
                (self.path / str(version)).symlink_to(f"..data/{version}")
        if self._number > 1:
            shutil.rmtree(old)


def versions(client: httpx.Client) -> dict[int, str]:
    listed: list[dict[str, Any]] = client.get("/models").json()["versions"]
    return {one["version"]: one["state"] for one in listed}


def probabilities(client: httpx.Client) -> list[float]:
    """What the model that serves says of an image, which differs from one to another."""
    return [top["probability"] for top in post(client).json()["predictions"][0]["top"]]


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "models")


@pytest.fixture
def process(tmp_path: Path, volume: Volume) -> Iterator[Process]:
    volume.write({1: 1})
    with started(tmp_path, *on_model(volume.path, "--model-poll-s", "0.1")) as process:
        yield process


def test_versions_behind_links_are_served_and_what_they_link_to_is_no_version(process: Process):
    with process.ready() as client:
        assert versions(client) == {1: "live"}


def test_an_update_that_brings_a_version_is_taken_up(process: Process, volume: Volume):
    with process.ready() as client:
        volume.write({1: 1, 2: 2})
        process.wait(lambda: versions(client) == {1: "available", 2: "live"})


def test_an_update_that_takes_a_version_away_goes_back(process: Process, volume: Volume):
    with process.ready() as client:
        volume.write({1: 1, 2: 2})
        process.wait(lambda: versions(client).get(2) == "live")
        volume.write({1: 1})
        process.wait(lambda: versions(client) == {1: "live"})


def test_an_update_that_changes_a_version_is_taken_up(process: Process, volume: Volume):
    with process.ready() as client:
        before = probabilities(client)
        volume.write({1: 7})
        process.wait(lambda: probabilities(client) != before)
        assert versions(client) == {1: "live"}


def test_the_folder_itself_may_be_a_link_that_is_turned_around(tmp_path: Path):
    """As git-sync does it, and as KServe's modelcar links /mnt/models into the model's image."""
    for name, version in (("a", 1), ("b", 2)):
        make_model_folder(tmp_path / name, version)
    (tmp_path / "current").symlink_to("a")
    with (
        started(tmp_path, *on_model(tmp_path / "current", "--model-poll-s", "0.1")) as process,
        process.ready() as client,
    ):
        assert versions(client) == {1: "live"}
        (tmp_path / "next").symlink_to("b")
        (tmp_path / "next").rename(tmp_path / "current")
        process.wait(lambda: versions(client) == {2: "live"})
