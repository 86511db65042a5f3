"""The report: rows as they come, one Markdown page and one CSV file, both complete after every row."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common import format_cell, write_csv

COLUMNS = (
    *("part", "model", "precision", "form", "batch", "runs", "ms_median", "ms_best", "images_per_s"),
    *("connections", "p50_ms", "p99_ms", "errors", "note"),
)
OUTCOMES = ("part", "model", "precision", "form", "note")
HTTP = ("part", "model", "precision", "batch", "connections", "images_per_s", "p50_ms", "p99_ms", "errors", "note")
MEASURED = ("images_per_s", "p99_ms")

Row = dict[str, object]


class Report:
    """Keeps the rows, and writes `report.md` and `report.csv` anew with each of them.

    Args:
        folder: where the two files go; made if it is not there.
        about: what the figures are worth nothing without, see `benchmarks.common.describe_run`.

    Attributes:
        rows: so far, each with all `COLUMNS`.
        state: one sentence at the head of the page.
    """

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder = folder
        self.about = dict(about)
        self.rows: list[Row] = []
        self.state = "Not complete: it was still running, or was killed."

    def add(self, part: str, **values: object) -> None:
        """Add a row, write both files, and print it.

        Raises:
            KeyError: a value belongs to no column.
        """
        row: Row = dict.fromkeys(COLUMNS)
        for name, value in {"part": part, **values}.items():
            if name not in row:
                raise KeyError(name)
            row[name] = value
        self.rows.append(row)
        self.write()
        print("  ".join(f"{name} {format_cell(value)}" for name, value in row.items() if value is not None), flush=True)

    def write(self) -> None:
        """Write both files, each at once, so that a stop leaves a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = (self.folder / ".part").absolute()
        part.write_text("\n".join(self._page()) + "\n", encoding="utf-8")
        part.replace(self.folder / "report.md")
        if self.rows:
            write_csv(part, self.rows, self.about | {"state": self.state})
            part.replace(self.folder / "report.csv")

    def best(self, model: str, precision: str) -> Row | None:
        """Return the engine's row with the most images a second; None if nothing was measured."""
        rows = [row for row in self._speeds(model) if row["part"] == "engine" and row["precision"] == precision]
        return max(rows, key=_rate, default=None)

    def _speeds(self, model: str) -> list[Row]:
        return [row for row in self.rows if row["model"] == model and row["runs"] is not None]

    def _page(self) -> Iterator[str]:
        yield f"# Report of {self.about.get('gpu') or 'a CPU run'}"
        yield f"\n{self.state}\n"
        yield from table(("what", "value"), [{"what": name, "value": text} for name, text in self.about.items()])
        models = list(dict.fromkeys(str(row["model"]) for row in self.rows if row["runs"] is not None))
        if models:
            yield "\n## Images a second by batch\n"
            yield "In brackets: median milliseconds of a batch, from host memory to logits in host memory.\n"
            yield "Bold: the model's highest rate."
        for model in models:
            yield f"\n### {model}\n"
            yield from speed_table(self._speeds(model))
        served = [row for row in self.rows if row["runs"] is None and any(row[name] is not None for name in MEASURED)]
        if served:
            yield "\n## Over HTTP\n"
            yield from table(HTTP, served)
        others = [row for row in self.rows if row["runs"] is None and row not in served]
        if others:
            yield "\n## Checks, and what was not measured\n"
            yield from table(OUTCOMES, others)


def speed_table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table with a line a batch size, and a column a form and precision."""
    columns = list(dict.fromkeys(_column(row) for row in rows))
    fastest = max(rows, key=_rate)
    cells: dict[object, Row] = {}
    for row in rows:
        cell = f"{format_cell(row['images_per_s'])} ({format_cell(row['ms_median'])})"
        line = cells.setdefault(row["batch"], {"batch": row["batch"]})
        line[_column(row)] = f"**{cell}**" if row is fastest else cell
    yield from table(("batch", *columns), [cells[batch] for batch in sorted(cells, key=int)])  # type: ignore[call-overload]


def table(columns: tuple[str, ...], rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table; cells that a row has not, and None, are empty."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name)) for name in columns)} |"


def _column(row: Row) -> str:
    return f"{row['form']}, {row['precision']}"


def _rate(row: Row) -> float:
    return float(str(row["images_per_s"]))


def _cell(value: object) -> str:
    return "" if value is None else " ".join(format_cell(value).replace("|", "\\|").split())
