"""Markdown elements of the model card."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 116
# What Markdown, or HTML in it, may interpret; an underscore within a word is plain text.
MARKUP = re.compile(r"[\\`*<>\[\]|~$#&]|(?<!\w)_|_(?!\w)")


def literal(name: str) -> str:
    """Return a user's name as text, with markup escaped."""
    return MARKUP.sub(r"\\\g<0>", " ".join(name.split()))


def code(name: str) -> str:
    """Return a user's name as inline code."""
    name = " ".join(name.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    space = " " if "`" in name else ""
    return f"{fence}{space}{name}{space}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paragraph(text: str) -> str:
    """Return text, wrapped."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def bullet(text: str) -> str:
    """Return an item of a list, wrapped."""
    return textwrap.fill(
        text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def image(caption: str, file: str) -> str:
    """Return an image that lies beside the card."""
    return f"![{caption}]({file})"


def duration(seconds: float) -> str:
    """Return "1 h 23 min (4,980 s)", "23 min (1,380 s)" or "45 s"."""
    whole, minutes = f"{seconds:,.0f} s", round(seconds / 60)
    if minutes < 2:
        return whole
    return f"{minutes // 60} h {minutes % 60} min ({whole})" if minutes >= 60 else f"{minutes} min ({whole})"
