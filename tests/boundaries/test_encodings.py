"""Text files are UTF-8 whatever the locale is: class names come in all scripts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("training", "export", "service", "imaging", "benchmarks", "docker", "docs")


def text_in_the_locales_encoding(source: str) -> Iterator[int]:
    """Yield the lines that read or write a text file and don't say how it is encoded."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if name in ("read_text", "write_text") or (
            name == "open" and modes and "b" not in modes[-1] and ":" not in modes[-1]
        ):
            yield node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_every_text_file_says_its_encoding(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / package).rglob("*.py")
        if (lines := list(text_in_the_locales_encoding(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "call", ["path.read_text()", "path.write_text(words)", "path.open('a')", "open(path, 'w', newline='')"]
)
def test_what_is_found(call: str) -> None:
    assert list(text_in_the_locales_encoding(call)) == [1]


@pytest.mark.parametrize(
    "call", ["path.read_text(encoding='utf-8')", "path.open('rb')", "tarfile.open(path, 'r:gz')", "Image.open(path)"]
)
def test_what_is_not(call: str) -> None:
    assert list(text_in_the_locales_encoding(call)) == []
