"""What every measurement needs: where and with what it was made, tables, CSV files, model paths."""

import csv
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from service.engine.metadata import MODEL_FILE, ArtifactError
from service.repository.folder import list_versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "uvicorn", "uvloop", "httptools", "fastapi")


class BenchmarkError(Exception):
    """A measurement can't be made: one sentence for the user, with what would be right."""


def run_command(main: Callable[[], int], *errors: type[Exception]) -> NoReturn:
    """Run a benchmark's main and exit, with `errors` as one sentence.

    SIGTERM ends it like Ctrl-C does, so that a server that it has started is stopped.
    """

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main())
    except (BenchmarkError, ArtifactError, *errors) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def describe_run() -> dict[str, str]:
    """Return what a number is worth without: machine, versions, commit, command, and how busy the machine was."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "machine": f"{cpu_model()}, {usable_cores()} cores, {_memory()}",
        **_gpu(),
        "system": platform.platform(),
        "load": f"{os.getloadavg()[0]:.2f} (mean number of running processes over the minute before the start)",
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{n} {v}" for n, v in versions.items() if v)]),
        "commit": git_commit() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.machine()
    # Virtual machines often hide the name's last part; family and model still tell the generation.
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def usable_cores() -> int:
    """Return how many cores this process may use; taskset and containers can make it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit() -> str | None:
    """Return the commit of this tree, "-dirty" behind it when files were changed; None outside git."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu() -> dict[str, str]:
    names = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {"gpu": "; ".join(names.splitlines())} if names else {}


def _memory() -> str:
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * page_size / 2**30:.0f} GiB"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_run(about: Mapping[str, str]) -> None:
    """Print what `describe_run` found, one line each."""
    width = max(map(len, about))
    for key, value in about.items():
        print(f"{key:<{width}}  {value}")
    print(flush=True)


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Lay out rows that share their keys as a table: text to the left, numbers to the right."""
    names = list(rows[0])
    columns = [[name, *(format_cell(row[name]) for row in rows)] for name in names]
    aligned = []
    for name, column in zip(names, columns, strict=True):
        side, width = "<" if isinstance(rows[0][name], str) else ">", max(map(len, column))
        aligned.append([f"{cell:{side}{width}}" for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def format_cell(value: object) -> str:
    """Write a number with about four digits, None as a dash."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_csv(name: Path, rows: Sequence[Mapping[str, object]], about: Mapping[str, str]) -> Path:
    """Write rows that share their keys below "# key: value" lines that say where they come from.

    Args:
        name: a bare file name goes to benchmarks/results/; anything with a folder in it is taken as it is.
        rows: at least one; None is an empty field.
        about: what `describe_run` returned.

    Returns:
        the path of the file.
    """
    path = RESULTS / name if name.parent == Path() and not name.is_absolute() else name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def join_spread(row: Mapping[str, object]) -> dict[str, object]:
    """Put the columns NAME, NAME_min and NAME_max into one cell, "median (min to max)"."""
    joined: dict[str, object] = {}
    for name, value in row.items():
        if name.endswith(("_min", "_max")):
            continue
        if value is not None and f"{name}_min" in row:
            low, high = format_cell(row[f"{name}_min"]), format_cell(row[f"{name}_max"])
            joined[name] = format_cell(value) if low == high else f"{format_cell(value)} ({low} to {high})"
        else:
            joined[name] = value
    return joined


def report(rows: Sequence[Mapping[str, object]], about: Mapping[str, str], csv_name: Path | None) -> None:
    """Print rows as a table, and write them too where a file is named; see `write_csv`."""
    print(format_table([join_spread(row) for row in rows]))
    if csv_name:
        print(f"\nwritten: {write_csv(csv_name, rows, about)}")


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is.

    Attributes:
        folder: holds the version folders; what the service's `model_dir` wants.
        version: number of the version folder.
        path: the version folder.
    """

    folder: Path
    version: int
    path: Path


def find_model(path: Path) -> ModelPlace:
    """Find a model version: `path` is a version folder, or a folder of versions, of which the highest is taken.

    Raises:
        BenchmarkError: it is neither.
    """
    path = path.resolve()
    if (path / MODEL_FILE).is_file() and path.name.isdigit():
        return ModelPlace(path.parent, int(path.name), path)
    versions = list_versions(path)
    if not versions:
        raise BenchmarkError(f"{path}: must be a model folder, which holds 1/{MODEL_FILE}, or one of its versions")
    return ModelPlace(path, versions[-1].number, versions[-1].path)
