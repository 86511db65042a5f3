"""What a panel of the dashboard is, and the queries that several have in common."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["stat", "timeseries", "heatmap", "state-timeline"]

# One service or several: the variable at the top of the dashboard.
HERE = 'instance=~"$instance"'
RATE = "[$__rate_interval]"
INFERENCE = 'route=~"/predict|/embed|/v2/.*/infer"'

IMAGES = "suffix: images"
IMAGES_A_SECOND = "suffix: images/s"


@dataclass(frozen=True)
class Query:
    """One PromQL query and the names of its series ({{label}} is filled in)."""

    expr: str
    legend: str
    exemplar: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's name of it.
        shows, bad, do: sentences; together they are the description behind the panel's (i).
        queries: of a heat map one, of the buckets of a histogram by `le`.
        width: of the dashboard's 24 columns.
        thresholds: from which values on a number turns orange and red.
        stacked: series on top of each other, where their sum means something.
        dashed: legends of series that are limits, drawn as dashed lines.
        names: show the series' name instead of its value.
        words: value -> what stands there instead.
        needs_gpu: without an NVIDIA GPU, or NVIDIA's exporter, there is nothing to show.
    """

    title: str
    kind: Kind
    unit: str
    shows: str
    bad: str
    do: str
    queries: tuple[Query, ...]
    width: int = 12
    thresholds: tuple[float, float] | None = None
    stacked: bool = False
    dashed: tuple[str, ...] = ()
    names: bool = False
    words: tuple[tuple[str, str], ...] = ()
    needs_gpu: bool = False


@dataclass(frozen=True)
class Row:
    """Panels below one heading, all of one height in grid units of 30 pixels."""

    title: str
    height: int
    panels: tuple[Panel, ...]


def rate(name: str, *matchers: str, by: str = "") -> str:
    """Return the query for a counter's increase a second, summed over the instances."""
    selector = ", ".join((*matchers, HERE))
    return f"sum{f' by ({by})' if by else ''} (rate({name}{{{selector}}}{RATE}))"


def share(codes: str) -> str:
    """Return the query for the share of requests for inference with these answers, over 5 minutes; 0 without any."""
    selector = f"perceiver_requests_total{{{INFERENCE}, {codes}, {HERE}}}"
    total = f"perceiver_requests_total{{{INFERENCE}, {HERE}}}"
    return f"sum(rate({selector}[5m])) / (sum(rate({total}[5m])) > 0) or vector(0)"


def quantile(q: float, histogram: str, by: str = "le", window: str = RATE) -> str:
    """Return the query for a quantile of a histogram, for all instances together or by one more label."""
    return f"histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket{{{HERE}}}{window})))"


def mean(histogram: str) -> str:
    """Return the query for the mean of what a histogram has observed."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"
