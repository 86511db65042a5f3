"""docs/reference.md is what the code says."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_current() -> None:
    written = runpy.run_path(str(DOCS / "write_reference.py"))["page"]()
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == written, "run: python docs/write_reference.py"
