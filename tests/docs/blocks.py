"""The code blocks of README and docs, and which of their lines are commands.

A block that can't run here is marked by a comment before it, and a page of such blocks by one before its title:

    <!-- not run: needs Docker -->
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
# Those of docs/experiments are commands of the day.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")})
MARKER = re.compile(r"<!-- not run: (.+) -->\s*")
SHELL = {"", "sh", "bash", "console"}
PROGRAMS = {"python", "javascript", "js"}
DATA = {"json", "yaml", "mermaid", "text", "toml", "ini", "promql", "nginx"}
# Commands whether or not this machine has them; what else is on PATH is one as well.
KNOWN = {
    "make",
    "python",
    "python3",
    "pip",
    "torchrun",
    "curl",
    "git",
    "docker",
    "helm",
    "kubectl",
    "for",
    "cd",
    "source",
}


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: path from the repository's root.
        line: number of its first line of code.
        language: of a fence; "" for one without, and for an indented block.
        text: the code.
        why_not: the reason of its marker; None: it is to be run.
    """

    page: str
    line: int
    language: str
    text: str
    why_not: str | None


@dataclass(frozen=True)
class Command:
    """A command line, joined where it is continued, and without the prompt."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str, text: str) -> Iterator[Block]:
    """Yield the code blocks of a page.

    Raises:
        ValueError: a marker stands neither before the page's title nor before a block.
    """
    tokens = [token for token in MarkdownIt("commonmark").parse(text) if not token.type.endswith("_close")]
    of_page = None
    for number, token in enumerate(tokens):
        marker = MARKER.fullmatch(token.content) if token.type == "html_block" else None
        follows = tokens[number + 1].type if number + 1 < len(tokens) else ""
        if marker and number == 0 and follows == "heading_open":
            of_page = marker[1]
        elif marker and follows not in ("fence", "code_block"):
            assert token.map
            raise ValueError(f"{page}:{token.map[0] + 1}: a marker that no code block follows")
        if token.type in ("fence", "code_block"):
            assert token.map
            before = MARKER.fullmatch(tokens[number - 1].content) if number else None
            first = token.map[0] + (2 if token.type == "fence" else 1)
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(page, first, language, token.content, before[1] if before else of_page)


def commands(block: Block) -> Iterator[Command]:
    """Yield the lines that are commands; the others are what they print, or what a file holds."""
    lines = enumerate(block.text.splitlines(), block.line)
    for number, line in lines:
        text = line.removeprefix("$ ")
        while text.endswith("\\"):
            text = text[:-1] + next(lines, (0, ""))[1].lstrip()
        if line[:1].strip() and is_command(text):
            yield Command(block.page, number, text)


def is_command(text: str) -> bool:
    """Return whether a line begins with a program, after any assignments."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a quote that is not closed: no line of a shell
        return False
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    return bool(words) and (words[0] in KNOWN or words[0].startswith(".venv") or shutil.which(words[0]) is not None)


def all_blocks() -> list[Block]:
    """Return the blocks of every page."""
    return [block for path in PAGES for block in blocks(str(path.relative_to(ROOT)), path.read_text("utf-8"))]
