"""README and docs: each link leads somewhere, and what they show is what the code has."""

import json
import re
import runpy
import tomllib
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from service.api.paths import PAGE_FILES, PATHS, V2_INFER, known_path
from service.api.schemas import (
    EmbedResponse,
    ErrorResponse,
    ExplainResponse,
    HealthResponse,
    ModelsResponse,
    PredictResponse,
)
from service.engine.metadata import ModelMetadata
from service.errors import ERRORS
from service.settings import Settings
from tests.docs.blocks import blocks
from training.config import ModelConfig, TrainConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "benchmarks/*.md", "docs/**/*.md", "models/**/*.md", "docker/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
MARKDOWN = MarkdownIt("commonmark").enable("table")
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS.glob("*.md")]
# Files that a reader makes, and a name that stands for several.
ONES_OWN = {"docker/prometheus/alertmanagers/mine.yml", "docker/compose.gpu.yml", "benchmarks/rivals/NAME.txt"}
OF_OTHERS = {"--force-recreate", "--help"}  # of Docker, of argparse
# Paths of the protocol v2 of which the reference says that they are not there.
ABSENT = {
    "/v2/cudasharedmemory",
    "/v2/logging",
    "/v2/repository/models/NAME/load",
    "/v2/systemsharedmemory",
    "/v2/trace/setting",
}


def inline(path: Path) -> list[Token]:
    """All tokens within lines of text."""
    return [child for token in MARKDOWN.parse(path.read_text(encoding="utf-8")) for child in token.children or []]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them."""
    tokens = MARKDOWN.parse(path.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    found = set()
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def targets(path: Path) -> list[str]:
    """Where the links and images of a page lead, other hosts left out."""
    named = [str(token.attrs.get("href", token.attrs.get("src", ""))) for token in inline(path)]
    named += re.findall(r'<img src="([^"]+)"', path.read_text(encoding="utf-8"))
    return [target for target in named if target and not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", NAMES)
def test_each_link_and_anchor_resolves(page: str) -> None:
    path = ROOT / page
    broken = []
    for target in targets(path):
        name, _, anchor = unquote(target).partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_each_page_of_docs_is_reached_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in targets(ROOT / "README.md")}
    assert {*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"} <= linked


def test_each_path_that_docs_name_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    asked = re.findall(r"localhost:\d000(/[\w/.-]*)", text)
    asked += re.findall(r"\b(?:GET|POST) (/[\w/.{}-]*)", text)
    for span in (token.content for path in pages for token in inline(path) if token.type == "code_inline"):
        asked += re.findall(r"^(?:GET |POST )?(/(?:predict|explain|embed|health|metrics|models|v2)[\w/.-]*)", span)
    named = {path.rstrip(".") for path in asked if "..." not in path} - ABSENT
    unknown = {path for path in named if not is_known(path.replace("NAME", "m").replace("VERSION", "1"))}
    assert unknown == set()


def test_each_file_that_docs_name_exists() -> None:
    folders = "benchmarks|deploy|docker|docs|export|imaging|service|tests|training"
    named = {path for span in spans() for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*", span)}
    assert len(named) > 40
    assert {path for path in named if not (ROOT / path).exists()} == ONES_OWN


def test_each_module_and_flag_that_docs_name_exists() -> None:
    """Of commands within a line; `test_commands.py` has those of blocks."""
    modules = {module for span in spans() for module in re.findall(r"^\S*python -m ([\w.]+)", span)}
    assert len(modules) > 15
    assert {name for name in modules if find_spec(name) is None} == set()
    own = [span for span in spans() if re.match(r"--[a-z]|make |\S*python -m ", span)]
    flags = {word.partition("=")[0] for span in own for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    fields = {name for model in (Settings, ModelConfig, TrainConfig) for name in model.model_fields}
    named = {flag for flag in flags if flag[2:].replace("-", "_").removeprefix("no_") not in fields}
    programs = [
        "benchmarks/**/*.py",
        "export/**/*.py",
        "training/**/*.py",
        "tests/chaos/__main__.py",
        "tests/deploy/queue_share.py",
    ]
    text = "".join(path.read_text(encoding="utf-8") for pattern in programs for path in ROOT.glob(pattern))
    assert {flag for flag in named if f'"{flag}"' not in text} == OF_OTHERS


def spans() -> set[str]:
    """What stands as code within lines of the pages for readers."""
    return {token.content for path in GUIDES for token in inline(path) if token.type == "code_inline"}


def is_known(path: str) -> bool:
    """Whether the service answers a path, `/v2/models/` and other beginnings with dots after them included."""
    return known_path(path) != "other" or any(known.startswith(path) for known in {*PATHS, PAGE_FILES, V2_INFER})


def test_each_error_has_its_example() -> None:
    text = (DOCS / "http-api.md").read_text(encoding="utf-8").partition("## Errors")[2]
    for kind in ERRORS:
        assert re.search(rf"\b{kind.status}\b[ |]+`{kind.code}`", text), kind.code


def test_each_answer_that_is_shown_has_its_shape() -> None:
    page = "docs/http-api.md"
    data = [block.text for block in blocks(page, (ROOT / page).read_text(encoding="utf-8")) if block.language == "json"]
    shown = [json.loads(text) for text in data if "..." not in text]
    shapes = [PredictResponse, ExplainResponse, EmbedResponse, HealthResponse, ModelsResponse, ErrorResponse]
    assert len(shown) == len(shapes)
    for answer, shape in zip(shown, shapes, strict=True):
        for version in answer.get("versions", []):
            assert version["metadata"].keys() <= ModelMetadata.model_fields.keys()
            version["metadata"] = None  # the page shows a part of it
        shape.model_validate(answer)


def test_the_first_version_of_the_changelog_is_the_package_s_and_the_chart_s() -> None:
    version = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == yaml.safe_load((ROOT / "deploy/helm/perceiver/Chart.yaml").read_text())["appVersion"]


def test_the_chart_of_the_rivals_is_drawn_from_the_results() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_rivals.py"))["draw"]()
    assert drawn == (DOCS / "rivals.svg").read_text(encoding="utf-8"), "run: python docs/draw_rivals.py"
