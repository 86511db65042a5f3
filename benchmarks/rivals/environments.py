"""One virtual environment a rival, made the first time: rivals are no dependencies of the project."""

import subprocess
import sys
from pathlib import Path

from benchmarks.common import BenchmarkError

HERE = Path(__file__).parent
MARK = "installed.txt"
LOG_LINES = 5


def requirements(name: str) -> str:
    """Return the text of a rival's requirements file: exact versions."""
    return (HERE / f"{name}.txt").read_text(encoding="utf-8")


def environment(name: str, folder: Path) -> Path:
    """Return the interpreter of a rival's environment below `folder`, which is made when it is not there yet.

    An environment of other versions than the requirements file names is made anew.

    Raises:
        BenchmarkError: it can't be made, with the end of pip's output.
    """
    home = folder.resolve() / name
    python, mark = home / "bin" / "python", home / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") == requirements(name):
        return python
    print(f"{name}: making its environment in {home}", flush=True)
    _run(name, sys.executable, "-m", "venv", "--clear", str(home))
    # --no-deps: the file names all that the server imports, and of nvidia-pytriton that is the tritonserver alone.
    requirement = ("--no-deps", "--requirement", str(HERE / f"{name}.txt"))
    _run(name, str(python), "-m", "pip", "install", "--quiet", *requirement)
    mark.write_text(requirements(name), encoding="utf-8")
    return python


def _run(name: str, *command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr + error.stdout).splitlines() if not line.startswith("WARNING")]
        last = "\n".join(lines[-LOG_LINES:])
        raise BenchmarkError(
            f"{name}: its environment can't be made, {' '.join(command[1:4])} failed:\n{last}"
        ) from None
