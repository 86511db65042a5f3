"""Figures in README and docs are those of the shipped model's card, of the settings, and of the benchmarks' results."""

import csv
import json
import re
from pathlib import Path

import pytest

from service.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMITS = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("## Limits")[2].partition("\n## ")[0]
VERSIONS = [path for path in (ROOT / "models" / "perceiver-cifar100").iterdir() if path.name.isdigit()]
NEWEST = max(VERSIONS, key=lambda path: int(path.name))
UNITS = {"MiB": 2**20, "million": 10**6}


def cells(row: str) -> list[str]:
    """The cells of a table's row, without what makes them bold."""
    return [cell.strip().strip("*") for cell in row.strip("|").split("|")]


def test_the_shipped_model_is_the_highest_version_with_its_own_figures() -> None:
    (row,) = re.findall(r"^\| shipped, .*$", README, re.MULTILINE)
    label, parameters, top1, top5, _ = cells(row)
    assert re.search(r"version (\d+)\]\((.*)\)", label).groups() == (  # type: ignore[union-attr]
        NEWEST.name,
        f"models/perceiver-cifar100/{NEWEST.name}/README.md",
    )
    report = json.loads((NEWEST / "metrics.json").read_text())["report"]
    assert parameters == f"{report['parameters']:,}"
    assert (top1, top5) == (
        f"{report['test']['top1']:.2%}".replace("%", " %"),
        f"{report['test']['top5']:.2%}".replace("%", " %"),
    )
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {found for path in pages for found in re.findall(r"models/perceiver-cifar100/(\d+)/", path.read_text())}
    assert named == {NEWEST.name}


def test_how_it_bears_corrupted_images_is_the_card_s() -> None:
    shown = README.partition("Of 2,000 test images")[2].partition("\n")[0]
    report = json.loads((NEWEST / "metrics.json").read_text())["report"]
    *corruptions, rotation = report["corruptions"]
    assert re.findall(r"[\d.]+(?= %)", shown) == [f"{each['top1']:.1%}".rstrip("%") for each in corruptions]
    assert rotation["name"].startswith("rotation")  # which the README leaves out


@pytest.mark.parametrize(
    ("job", "name", "connections"),
    [
        ("tiny model, 64 connections", "rivals", "64"),
        ("shipped model, 64 connections", "rivals-shipped", "64"),
        ("shipped model, one connection", "rivals-shipped", "1"),
    ],
)
def test_ratios_are_those_of_the_results(job: str, name: str, connections: str) -> None:
    (row,) = re.findall(rf"^\| {job} .*$", README, re.MULTILINE)
    lines = (ROOT / "benchmarks" / "results" / f"{name}.csv").read_text().splitlines()
    results = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = {row["server"]: row for row in results if row["connections"] == connections}
    for server, shown in zip(("Triton", "Mosec"), cells(row)[1:3], strict=True):
        ratio, least, most = (float(rows[server][f"ours_by_it{end}"]) for end in ("", "_min", "_max"))
        assert shown == f"{ratio:.2f}** ({least:.2f} to {most:.2f})"


def test_the_limits_are_the_settings_defaults() -> None:
    rows = [cells(row) for row in LIMITS.splitlines() if "`PERCEIVER_" in row]
    assert len(rows) > 15
    for what, shown, setting, _ in rows:
        number, unit = re.match(r"([\d,.]+) ?(MiB|million)?", shown).groups()  # type: ignore[union-attr]
        name = setting.strip("`").removeprefix("PERCEIVER_").lower()
        scale = UNITS.get(unit, 1000 if name.endswith("_ms") else 1)
        assert float(number.replace(",", "")) * scale == Settings.model_fields[name].default, what
