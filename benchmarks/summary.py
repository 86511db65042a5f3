"""From records to the figures that are printed: rates, percentiles, errors, the Server-Timing split."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.common import format_table
from benchmarks.processes import Load

PERCENTILES = (50, 90, 95, 99)
PHASES = ("decode", "queue", "inference", "total")  # of the service's Server-Timing header
_METRIC = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*(?:;[^,]*?\bdur=([0-9.]+))?[^,]*,?\s*")


def percentile(values: ArrayLike, q: float) -> float:
    """Return the nearest-rank percentile: the smallest value that q per cent of all do not exceed; NaN of none."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.percentile(array, q, method="inverted_cdf")) if array.size else float("nan")


def spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Return mean, percentiles and maximum by name."""
    if not values.size:
        return {}
    ranks = {f"p{q}": percentile(values, q) for q in PERCENTILES}
    return {"mean": float(values.mean()), **ranks, "max": float(values.max())}


def parse_server_timing(value: bytes) -> dict[str, float]:
    """Read "decode;dur=0.1, queue;dur=0.2" into milliseconds by name; metrics without a duration are left out."""
    return {name.decode(): float(duration) for name, duration in _METRIC.findall(value) if duration}


def error_code(status: int, failure: str, body: bytes) -> str:
    """Name what went wrong: "503 overloaded", "500" where the body says nothing, or why no answer came."""
    if failure:
        return failure
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return str(status)
    return f"{status} {code}"


@dataclass(frozen=True)
class Summary:
    """Figures of the requests that were scheduled within the window.

    Attributes:
        requests: how many they are.
        answered: those with status 200.
        requests_per_second, images_per_second: what was answered with 200 within the window, by its length; a request
            that lies partly in it counts with that part, so that long batches at its edges don't make the figure jump.
        latency_ms: of those answered, from the scheduled time to the end of the answer: mean, p50 ... max.
        late_ms: how long after its scheduled time each was sent: large when all connections were busy.
        rejected_ms: latency of the answers that are not 200.
        phases_ms: Server-Timing of those answered, by phase.
        errors: number of requests by what went wrong.
        server_cpu_ms: the server's CPU milliseconds an image; None where they can't be read.
        client_cpu_ms: the generator's CPU milliseconds a request.
    """

    requests: int
    answered: int
    requests_per_second: float
    images_per_second: float
    latency_ms: dict[str, float]
    late_ms: dict[str, float]
    rejected_ms: dict[str, float]
    phases_ms: dict[str, dict[str, float]]
    errors: dict[str, int]
    server_cpu_ms: float | None
    client_cpu_ms: float


def summarize(load: Load, images_per_request: int = 1) -> Summary:
    """Reduce a load to its figures."""
    records = load.records
    scheduled, ended = np.array(records.scheduled), np.array(records.ended)
    good = np.array(records.status, dtype=int) == 200
    answered = np.array([failure == "" for failure in records.failure], dtype=bool)
    counted = (scheduled >= load.begin) & (scheduled < load.end)
    latency = (ended - scheduled) * 1e3
    done = float((_share_within(load) * good).sum())
    cpu = load.server_cpu_seconds
    return Summary(
        requests=int(counted.sum()),
        answered=int((counted & good).sum()),
        requests_per_second=done / load.seconds,
        images_per_second=done * images_per_request / load.seconds,
        latency_ms=spread(latency[counted & good]),
        late_ms=spread((np.array(records.sent) - scheduled)[counted] * 1e3),
        rejected_ms=spread(latency[counted & answered & ~good]),
        phases_ms=_phases(load, counted & good),
        errors=_errors(load, counted & ~good),
        server_cpu_ms=None if cpu is None or not done else cpu * 1e3 / (done * images_per_request),
        client_cpu_ms=records.cpu_seconds * 1e3 / max(len(records), 1),
    )


def medians(summaries: Sequence[Summary]) -> dict[str, object]:
    """Reduce the rounds of one kind of request to one row: medians with minimum and maximum, and all errors."""
    return {
        **over_rounds("images_per_s", [summary.images_per_second for summary in summaries]),
        **over_rounds("server_cpu_ms", [summary.server_cpu_ms for summary in summaries]),
        **over_rounds("p50_ms", [summary.latency_ms.get("p50") for summary in summaries]),
        **over_rounds("p99_ms", [summary.latency_ms.get("p99") for summary in summaries]),
        **over_rounds("client_cpu_ms", [summary.client_cpu_ms for summary in summaries]),
        "errors": sum(sum(summary.errors.values()) for summary in summaries),
    }


def over_rounds(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the median of a figure with its minimum and maximum, as three columns; None where no round has it."""
    known = [value for value in values if value is not None]
    reduced = (median(known), min(known), max(known)) if known else (None, None, None)
    return dict(zip((name, f"{name}_min", f"{name}_max"), reduced, strict=True))


def _share_within(load: Load) -> NDArray[np.float64]:
    """Return which part of each request, from sent to answered, lies in the window: float64 [N] in 0..1."""
    sent, ended = np.array(load.records.sent), np.array(load.records.ended)
    overlap = np.minimum(ended, load.end) - np.maximum(sent, load.begin)
    share: NDArray[np.float64] = (overlap / np.maximum(ended - sent, 1e-9)).clip(0, 1)
    return share


def _phases(load: Load, mask: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    timings = [parse_server_timing(load.records.server_timing[i]) for i in np.flatnonzero(mask)]
    columns = {phase: np.array([timing[phase] for timing in timings if phase in timing]) for phase in PHASES}
    return {phase: spread(column) for phase, column in columns.items() if column.size}


def _errors(load: Load, mask: NDArray[np.bool_]) -> dict[str, int]:
    records = load.records
    codes = (error_code(records.status[i], records.failure[i], records.body[i]) for i in np.flatnonzero(mask))
    return dict(Counter(codes).most_common())


def format_summary(summary: Summary) -> str:
    """Lay the figures out for people."""
    lines = [
        f"requests    {summary.requests} ({summary.answered} answered with 200)",
        f"goodput     {summary.requests_per_second:.1f} requests/s, {summary.images_per_second:.1f} images/s",
        "errors      " + (", ".join(f"{code}: {n}" for code, n in summary.errors.items()) or "none"),
        f"server CPU  {_or_unknown(summary.server_cpu_ms)} ms an image",
        f"client CPU  {summary.client_cpu_ms:.3f} ms a request",
        "",
        format_table(spread_rows(summary)),
    ]
    return "\n".join(lines)


def spread_rows(summary: Summary) -> list[dict[str, object]]:
    """One row a kind of duration, in milliseconds; none without a value."""
    kinds: Mapping[str, dict[str, float]] = {
        "latency": summary.latency_ms,
        **summary.phases_ms,
        "rejected": summary.rejected_ms,
        "sent late": summary.late_ms,
    }
    return [{"ms": name, **values} for name, values in kinds.items() if values] or [{"ms": "nothing was answered"}]


def csv_row(summary: Summary) -> dict[str, object]:
    """The same figures as one flat row; the columns do not depend on what happened."""
    flat: dict[str, object] = {
        "requests": summary.requests,
        "answered": summary.answered,
        "requests_per_second": summary.requests_per_second,
        "images_per_second": summary.images_per_second,
        "server_cpu_ms_per_image": summary.server_cpu_ms,
        "client_cpu_ms_per_request": summary.client_cpu_ms,
    }
    for name in ("mean", *(f"p{q}" for q in PERCENTILES), "max"):
        flat[f"latency_{name}_ms"] = summary.latency_ms.get(name)
    for phase in PHASES:
        for name in ("mean", "p50", "p99"):
            flat[f"{phase}_{name}_ms"] = summary.phases_ms.get(phase, {}).get(name)
    return flat | {"errors": "; ".join(f"{code}: {n}" for code, n in summary.errors.items())}


def _or_unknown(value: float | None) -> str:
    return (
        "unknown (read on Linux, of a server on this machine whose process --pid names)"
        if value is None
        else f"{value:.3f}"
    )
