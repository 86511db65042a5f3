"""Print the requirements of the project and of the extras named, one a line, as pip's -r reads them.

The images install what the project needs and not the project itself: no build backend, and a layer that changes only
when pyproject.toml does.
"""

import sys
import tomllib
from pathlib import Path


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """Return the base dependencies and those of the extras; KeyError where there is no such extra."""
    base, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(base, list)
    assert isinstance(optional, dict)
    return base + [requirement for extra in extras for requirement in optional[extra]]


if __name__ == "__main__":
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    print(*requirements(pyproject["project"], sys.argv[1:]), sep="\n")
