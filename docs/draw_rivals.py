"""Draw docs/rivals.svg: requests a second beside other servers, from the CSV files of `python -m benchmarks.rivals`.

python docs/draw_rivals.py
"""

import csv
import io
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TARGET = Path(__file__).parent / "rivals.svg"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PANELS = (  # title, file, connections
    ("Tiny model", "rivals.csv", "64"),
    ("Shipped model", "rivals-shipped.csv", "64"),
    ("Shipped model", "rivals-shipped.csv", "1"),
)
OURS, OTHERS = "#117068", "#9aa3ad"


def rows_of(name: str, connections: str) -> tuple[str, list[dict[str, str]]]:
    """Return the machine of a CSV file of results, and its rows for so many connections."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    (machine,) = (line.removeprefix("# machine: ") for line in lines if line.startswith("# machine: "))
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return machine, [row for row in rows if row["connections"] == connections]


def draw() -> str:
    """Return the SVG: a panel for each model, a bar for each server, with the range over the rounds."""
    tables = [rows_of(name, connections) for _, name, connections in PANELS]
    heights = [len(rows) for _, rows in tables]
    with plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "rivals", "font.family": "sans-serif", "font.size": 10}
    ):
        figure, axes = plt.subplots(
            len(PANELS), figsize=(8, 0.42 * sum(heights) + 1.6), height_ratios=heights, layout="constrained"
        )
        for axis, (title, _, connections), (machine, rows) in zip(axes, PANELS, tables, strict=True):
            middle, low, high = ([float(row[f"images_per_s{end}"]) for row in rows] for end in ("", "_min", "_max"))
            spread = [[m - least for m, least in zip(middle, low, strict=True)]]
            spread.append([most - m for m, most in zip(middle, high, strict=True)])
            names = [row["server"] for row in rows]
            colours = [OURS if server == "this service" else OTHERS for server in names]
            axis.barh(names, middle, xerr=spread, color=colours, height=0.62, error_kw={"elinewidth": 1, "capsize": 3})
            for place, (value, most) in enumerate(zip(middle, high, strict=True)):
                axis.text(most + 0.01 * max(high), place, f" {value:,.0f}", va="center")
            many = "one connection" if connections == "1" else f"{connections} connections"
            axis.set_title(f"{title}, {many}: {machine}", loc="left", fontsize=9)
            axis.set_xlim(0, 1.12 * max(high))
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[-1].set_xlabel("requests a second: median, least and most of the rounds")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
