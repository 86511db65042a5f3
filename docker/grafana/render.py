"""Draw the dashboard's panels from a Prometheus that has watched a service, for where no Grafana is.

python docker/grafana/render.py --url http://localhost:9090 --minutes 60 --out docs/dashboard.png
"""

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dashboard import COLUMNS, ROWS, alarms, version_changes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from panel import Panel, Row

POINTS = 240
INCHES_A_COLUMN, INCHES_A_ROW = 0.6, 0.29  # of Grafana's grid
LEFT, RIGHT, TOP, BOTTOM, FOOTER = 0.72, 0.12, 0.3, 0.28, 0.35  # around a panel's axes, and below all, in inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
GREEN, RED, GREY = "#009E73", "#D55E00", "#8A8A8A"

Series = dict[str, "NDArray[np.float64]"]


@dataclass(frozen=True)
class Window:
    """Where and when to ask: `POINTS` times up to `end`, in seconds since 1970."""

    url: str
    end: float
    seconds: float

    @property
    def step(self) -> float:
        """Seconds from point to point."""
        return self.seconds / POINTS

    @property
    def minutes(self) -> "NDArray[np.float64]":
        """The points, in minutes from the first."""
        return np.arange(POINTS + 1) * self.step / 60

    def ask(self, expression: str, legend: str) -> Series:
        """Return a query's series by legend: float64 [POINTS + 1], NaN where there is no sample."""
        expression = expression.replace("$__rate_interval", f"{max(4 * self.step, 30):.0f}s").replace("$instance", ".*")
        start = self.end - self.seconds
        form = urllib.parse.urlencode({"query": expression, "start": start, "end": self.end, "step": self.step})
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{form}") as answer:  # noqa: S310 - the user's own
            found = json.load(answer)["data"]["result"]
        series: Series = {}
        for one in found:
            values = series.setdefault(name_of(one["metric"], legend), np.full(POINTS + 1, np.nan))
            for moment, value in one["values"]:
                values[round((moment - start) / self.step)] = float(value)
        return series


def name_of(labels: dict[str, str], legend: str) -> str:
    """Fill the labels into a legend."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def in_unit(value: float, unit: str) -> str:
    """Return a value as Grafana would write it in a unit."""
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB" if value < 2**30 else f"{value / 2**30:.3g} GiB"
    if unit == "dtdurations":
        return f"{value / 60:.3g} min"
    suffix = {"reqps": " req/s", "cps": "/s", "celsius": " °C", "watt": " W"}.get(unit, unit.removeprefix("suffix:"))
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return number + ("" if unit in ("short", "sci") else suffix)


def draw_series(axes: Axes, panel: Panel, window: Window) -> None:
    """Draw lines, or areas on top of each other."""
    series = {name: v for query in panel.queries for name, v in window.ask(query.expr, query.legend).items()}
    limits = {name: values for name, values in series.items() if name in panel.dashed}
    rest = {name: values for name, values in series.items() if name not in panel.dashed}
    if panel.stacked and rest:
        values = [np.nan_to_num(values) for values in rest.values()]
        axes.stackplot(window.minutes, values, labels=list(rest), colors=COLOURS, alpha=0.7)
    else:
        for colour, (name, values) in zip(COLOURS * 3, rest.items(), strict=False):
            axes.plot(window.minutes, values, label=name, color=colour, linewidth=1.3)
    for name, values in limits.items():
        axes.plot(window.minutes, values, label=name, color=GREY, linewidth=1.1, linestyle="--")
    if panel.unit != "sci":
        axes.set_ylim(0, 1.3 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    if series:
        axes.legend(fontsize=6.5, loc="upper left", ncols=2, frameon=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_unit(value, panel.unit)))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def draw_heatmap(axes: Axes, panel: Panel, window: Window) -> None:
    """Draw counts by bucket and time; the buckets of Prometheus hold all smaller ones, too."""
    series = window.ask(panel.queries[0].expr, "{{le}}")
    bounds = sorted(series, key=float)
    counts = np.diff(np.nan_to_num([series[bound] for bound in bounds]), axis=0, prepend=0).clip(min=0)
    used = np.flatnonzero(counts.any(axis=1))
    low, high = (used.min(), used.max() + 1) if used.size else (0, len(bounds))
    rows = np.arange(low, high + 1)
    axes.pcolormesh(window.minutes, rows[:-1] + 0.5, np.sqrt(counts[low:high]), cmap="Oranges", shading="nearest")
    axes.set_yticks(rows[1:], [in_unit(float(bound), panel.unit) for bound in bounds[low:high]], fontsize=6.5)


def draw_states(axes: Axes, panel: Panel, window: Window) -> None:
    """Draw a bar for each series while it is there."""
    series = window.ask(panel.queries[0].expr, panel.queries[0].legend)
    for row, (colour, (name, values)) in enumerate(zip(COLOURS, series.items(), strict=False)):
        axes.fill_between(window.minutes, row + 0.1, row + 0.9, where=np.isfinite(values), color=colour, step="mid")
        begin = window.minutes[np.flatnonzero(np.isfinite(values))[0]]
        axes.text(begin, row + 0.5, f" {name}", va="center", fontsize=7.5, color="white", fontweight="bold")
    axes.set_ylim(len(series), 0)
    axes.set_yticks([])


def draw_stat(axes: Axes, panel: Panel, window: Window) -> None:
    """Write the last value."""
    axes.axis("off")
    last = {
        name: values[np.isfinite(values)][-1]
        for query in panel.queries
        for name, values in window.ask(query.expr, query.legend).items()
        if np.isfinite(values[-3:]).any()
    }
    name, value = next(iter(last.items()), ("no data", 0.0))
    words = dict(panel.words)
    text = name if panel.names or not last else words.get(f"{value:g}", in_unit(value, panel.unit))
    bad = (panel.thresholds is not None and value >= panel.thresholds[1]) or (bool(words) and value == 0)
    axes.text(
        0.5, 0.42, text, ha="center", va="center", fontsize=10 if panel.names else 17, color=RED if bad else GREEN
    )


def draw(axes: Axes, panel: Panel, window: Window, marks: list[tuple[float, str]]) -> None:
    """Draw one panel with its title."""
    axes.set_title(panel.title, loc="left", fontsize=8.5, fontweight="bold")
    {"stat": draw_stat, "heatmap": draw_heatmap, "state-timeline": draw_states, "timeseries": draw_series}[panel.kind](
        axes, panel, window
    )
    if panel.kind == "stat":
        return
    for minute, colour in marks:
        axes.axvline(minute, color=colour, linewidth=0.9, linestyle=":")
    axes.set_xlim(0, window.minutes[-1])
    axes.tick_params(labelsize=6.5)
    if panel.kind == "timeseries":
        axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def marks_of(window: Window) -> list[tuple[float, str]]:
    """Return when annotations begin, in minutes, with their colours."""
    found = []
    for mark in (version_changes(), alarms()):
        for values in window.ask(mark["expr"], mark["titleFormat"]).values():
            there = np.isfinite(values)
            begins = np.flatnonzero(there & ~np.roll(there, 1))
            found += [(float(window.minutes[begin]), str(mark["iconColor"])) for begin in begins if begin > 0]
    return found


def image(window: Window, caption: str) -> Figure:
    """Draw all rows but those that need a GPU and have no data."""
    lines = [line for row in ROWS if has_data(row, window) for line in wrapped(row)]
    width, height = COLUMNS * INCHES_A_COLUMN, sum(rows for rows, _ in lines) * INCHES_A_ROW + FOOTER
    figure = Figure(figsize=(width, height))
    marks = marks_of(window)
    top = height
    for rows, panels in lines:
        left = 0.0
        for panel in panels:
            right, bottom = left + panel.width * INCHES_A_COLUMN, top - rows * INCHES_A_ROW
            x, y = left + LEFT, bottom + BOTTOM
            box = (x / width, y / height, (right - RIGHT - x) / width, (top - TOP - y) / height)
            draw(figure.add_axes(box), panel, window, marks)
            left = right
        top -= rows * INCHES_A_ROW
    figure.text(0.5, 0.1 / height, caption, ha="center", fontsize=9, color="#555555")
    return figure


def has_data(row: Row, window: Window) -> bool:
    """Whether a row can be drawn here."""
    queries = [query for panel in row.panels for query in panel.queries]
    return not all(panel.needs_gpu for panel in row.panels) or any(window.ask(q.expr, q.legend) for q in queries)


def wrapped(row: Row) -> list[tuple[int, list[Panel]]]:
    """Return a row's panels in lines that fit, each with its height."""
    lines: list[tuple[int, list[Panel]]] = []
    for panel in row.panels:
        if not lines or sum(other.width for other in lines[-1][1]) + panel.width > COLUMNS:
            lines.append((row.height, []))
        lines[-1][1].append(panel)
    return lines


def main() -> None:
    """Draw, and say where to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:9090", help="of the Prometheus")
    parser.add_argument("--minutes", type=float, default=60, help="how many")
    parser.add_argument("--end", type=float, default=time.time(), help="until when, Unix time; default: now")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    parser.add_argument("--caption", default="", help="what was run, and where")
    args: Any = parser.parse_args()
    window = Window(args.url, args.end, args.minutes * 60)
    image(window, f"minutes; {args.caption}" if args.caption else "minutes").savefig(args.out, dpi=110)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
