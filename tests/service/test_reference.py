"""docs/reference.md is what the code says, and says all that an operator needs."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from service.errors import ERRORS
from service.metrics.gpu import GpuCollector
from service.metrics.registry import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
UNITS = re.compile(
    r"\b(milliseconds|seconds|bytes|pixels|images|threads|processes|connections|port|number|numbers|version)\b",
    re.IGNORECASE,
)
PROMETHEUS = ROOT / "docker" / "prometheus"


def families() -> set[str]:
    """The names of all metrics, those of a GPU that is not here as well."""
    metrics = [*Metrics().registry.collect(), *GpuCollector().describe()]
    return {metric.name for metric in metrics}


def family_of(sample: str) -> str:
    """The metric that a sample belongs to."""
    return next(
        (
            sample.removesuffix(end)
            for end in ("_total", "_bucket", "_sum", "_count")
            if sample.removesuffix(end) in families()
        ),
        sample,
    )


def told(family: str) -> bool:
    """Whether the reference has a metric, under the name that Prometheus sees."""
    return f"| `{family}` |" in REFERENCE or f"| `{family}_total` |" in REFERENCE


@pytest.mark.smoke
def test_the_reference_is_current() -> None:
    written = runpy.run_path(str(DOCS / "write_reference.py"))["page"]()
    assert written == REFERENCE, "run: python docs/write_reference.py"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_default_a_consequence_and_a_unit(name: str) -> None:
    (row,) = re.findall(rf"^\| `PERCEIVER_{name.upper()}` \|(.*)\|$", REFERENCE, re.MULTILINE)
    flag, default, text = (cell.strip() for cell in row.split(" | "))
    assert flag.split(", ")[0] == f"`--{name.replace('_', '-')}`"
    assert default
    assert len(text.split()) > 3
    if any(kind in str(Settings.model_fields[name].annotation) for kind in ("int", "float")):
        assert UNITS.search(text), f"{name}: of what?"


def test_every_status_and_code_is_told() -> None:
    for kind in ERRORS:
        assert f"| {kind.status} | `{kind.code}` |" in REFERENCE
        assert re.search(rf"^\| [\d, ]*\b{kind.status}\b", OPERATIONS, re.MULTILINE), f"{kind.status}: what to do?"


def test_no_row_stands_twice() -> None:
    rows = [line.split("|")[1] for line in REFERENCE.splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert sorted(rows) == sorted(set(rows))


def test_every_metric_is_told() -> None:
    names = {name for name in families() if name.startswith("perceiver_")}
    assert len(names) > 20
    assert {name for name in names if not told(name)} == set()


def test_the_documents_name_no_setting_and_no_metric_that_there_is_not() -> None:
    pages = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS.glob("*.md")}
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    variables = {f"PERCEIVER_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\bPERCEIVER_[A-Z_]+[A-Z]\b", text)) <= variables
    named = set(re.findall(r"\bperceiver_[a-z_]+[a-z]\b", text)) - {"perceiver_image_classification"}  # of a URL
    assert {family_of(name) for name in named} <= families()


def test_every_alarm_has_its_runbook_and_uses_metrics_that_are_told() -> None:
    rules = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    every = [rule for document in rules for group in document["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in every if "record" in rule}
    for rule in every:
        if "alert" in rule:
            assert f"### {rule['alert']}\n" in OPERATIONS
        for name in re.findall(r"[\w:]*perceiver_[\w:]*", rule["expr"]):
            assert name in recorded or told(family_of(name)), name
