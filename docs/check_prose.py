"""Check the prose of README and docs: how long it is, its sentences and its lines, and words that are not to be used.

    python docs/check_prose.py

Tables, code and docs/experiments are left out. The status is 1 where a limit is exceeded. Vale would do the same, but
its package on PyPI fetches a program from elsewhere; proselint knows no length.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/*.md")
MAX_README_WORDS = 900
MAX_README_SENTENCE_WORDS = 25
MAX_SENTENCE_WORDS = 30
MAX_LINE_CHARACTERS = 160
# Each with the field's term for it.
WORDS = {
    r"pictures?": "image",
    r"ledgers?": "admission",
    r"patience": "timeout",
    r"slots?": "engine pool",
    r"quick way": "fast path",
    r"long way": "ASGI path",
    r"in the house": "in flight",
    r"cut off": "abort",
    r"take note|note that": "nothing: say it",
}
LEFT_OUT = {"table", "fence", "code_block", "html_block"}
# A full stop that ends no sentence stands behind one of these.
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\betc)[.!?]['\")]*\s+")


@dataclass(frozen=True)
class Page:
    """A page's prose: texts of paragraphs and headings with their first lines, counted from 1."""

    paragraphs: list[tuple[int, str]]
    headings: list[tuple[int, str]]
    lines: list[tuple[int, str]]

    @classmethod
    def of(cls, text: str) -> "Page":
        """Take the prose out of Markdown."""
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        taken: set[int] = set()
        texts: dict[str, list[tuple[int, str]]] = {"paragraph_open": [], "heading_open": []}
        kind = table = ""
        for token in tokens:
            if token.type.removesuffix("_open") in LEFT_OUT and token.map:
                taken.update(range(*token.map))
            table = {"table_open": "in", "table_close": ""}.get(token.type, table)
            kind = token.type if token.type.endswith("_open") else kind
            if token.type == "inline" and not table and kind in texts:
                assert token.map is not None
                texts[kind].append((token.map[0] + 1, plain(token.children or [])))
        lines = [(number + 1, line) for number, line in enumerate(text.splitlines()) if number not in taken]
        return cls(texts["paragraph_open"], texts["heading_open"], lines)

    def sentences(self) -> Iterator[tuple[int, str]]:
        """Each sentence, with the first line of its paragraph."""
        for line, paragraph in self.paragraphs:
            yield from ((line, sentence) for sentence in SENTENCE_END.split(paragraph) if count(sentence))

    @property
    def words(self) -> int:
        """How many words there are, headings included."""
        return sum(count(text) for _, text in (*self.paragraphs, *self.headings))

    @property
    def mean_sentence_words(self) -> float:
        """How many words a sentence has on average."""
        lengths = [count(sentence) for _, sentence in self.sentences()]
        return sum(lengths) / len(lengths) if lengths else 0.0


def plain(children: list[Token]) -> str:
    """Return the text of inline tokens, a code span as one word, without images."""
    parts = {"softbreak": " ", "hardbreak": " ", "code_inline": "CODE"}
    return "".join(child.content if child.type == "text" else parts.get(child.type, "") for child in children)


def count(text: str) -> int:
    """Return the number of words."""
    return sum(any(character.isalnum() for character in word) for word in text.split())


def problems(page: Page, max_sentence_words: int, max_words: int | None = None) -> Iterator[str]:
    """Yield `line: what is wrong` for each limit that a page exceeds."""
    if max_words is not None and page.words > max_words:
        yield f"1: {page.words} words, {max_words} at most"
    for line, sentence in page.sentences():
        if count(sentence) > max_sentence_words:
            yield f"{line}: a sentence of {count(sentence)} words, {max_sentence_words} at most: {sentence[:60]}..."
    for line, text in (*page.paragraphs, *page.headings):
        for pattern, better in WORDS.items():
            if found := re.search(rf"\b({pattern})\b", text, re.IGNORECASE):
                yield f"{line}: '{found[0]}' is not to be used; better: {better}"
    for line, text in page.lines:
        if len(text) > MAX_LINE_CHARACTERS:
            yield f"{line}: {len(text)} characters, {MAX_LINE_CHARACTERS} at most"


def main() -> int:
    """Print README's figures and all problems; return the exit status."""
    found = 0
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        page = Page.of(path.read_text(encoding="utf-8"))
        is_readme = path == ROOT / "README.md"
        limits = (MAX_README_SENTENCE_WORDS, MAX_README_WORDS) if is_readme else (MAX_SENTENCE_WORDS, None)
        if is_readme:
            longest = max(len(line) for _, line in page.lines)
            print(
                f"README.md: {page.words} words beside tables and code, {page.mean_sentence_words:.1f} a sentence, "
                f"longest line {longest} characters"
            )
        for problem in problems(page, *limits):
            print(f"{path.relative_to(ROOT)}:{problem}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
