"""The check of README's and docs' prose finds what it is for, and nothing in what is shipped."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "docs" / "check_prose.py"
MODULE = runpy.run_path(str(CHECK))
Page, problems = MODULE["Page"], MODULE["problems"]


def found(text: str, max_sentence_words: int = 5, max_words: int | None = None) -> list[str]:
    return list(problems(Page.of(text), max_sentence_words, max_words))


def test_what_is_shipped_passes_and_the_figures_are_printed() -> None:
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("README.md: ")
    assert all(word in done.stdout for word in ("words beside tables", "a sentence", "longest line"))


def test_words_and_sentences_are_counted_as_a_reader_counts_them() -> None:
    page = Page.of("# A title\n\nOne two `code span`. Two, e.g. three!\n\n- item one\n")
    assert [sentence for _, sentence in page.sentences()] == ["One two CODE", "Two, e.g. three!", "item one"]
    assert page.words == 2 + 3 + 3 + 2
    assert page.mean_sentence_words == pytest.approx(8 / 3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("One two three four five six.", 1),
        ("Short.\n\n- a list's item of six words", 3),
        ("Lines that\nare wrapped count\nas one.", 1),
        ("The picture.", 1),
        ("## Pictures", 1),
        ("x" * 161, 1),
    ],
)
def test_each_rule_finds_its_fault_and_names_the_line(text: str, line: int) -> None:
    (problem,) = found(text)
    assert problem.startswith(f"{line}: ")


def test_a_page_has_a_number_of_words_at_most() -> None:
    assert found("One two. Three four.", max_words=4) == []
    assert found("One two. Three four five.", max_words=4) == ["1: 5 words, 4 at most"]


@pytest.mark.parametrize(
    "text",
    [
        f"| a | b |\n|---|---|\n| picture {'word ' * 40} | x |",
        f"    picture {'word ' * 40}",
        f"```sh\npicture {'word ' * 40}\n```",
        "One two three.\nFour five six.",
        "Read [one](https://example.org/a/picture/of/many/words).",
    ],
)
def test_tables_code_and_addresses_are_left_out(text: str) -> None:
    assert found(text) == []
