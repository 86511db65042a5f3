import math

import numpy as np
import pytest

from benchmarks.generator import Records
from benchmarks.processes import Load
from benchmarks.summary import (
    csv_row,
    error_code,
    format_summary,
    parse_server_timing,
    percentile,
    spread,
    summarize,
)

TIMING = b"decode;dur=1.5, queue;dur=0.5"


def test_percentiles_are_values_that_occurred() -> None:
    values = [15, 20, 35, 40, 50]  # the example of the nearest-rank method
    assert [percentile(values, q) for q in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile(range(1, 101), 99) == 99
    assert percentile([7], 50) == 7
    assert math.isnan(percentile([], 50))


def test_spread() -> None:
    assert spread(np.arange(1.0, 101.0)) == {
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p95": 95,
        "p99": 99,
        "max": 100,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"decode;dur=0.123, queue;dur=4, inference;dur=56.7", {"decode": 0.123, "queue": 4, "inference": 56.7}),
        (b'cache;desc="a miss";dur=2.5,total;dur=3', {"cache": 2.5, "total": 3}),
        (b"miss, total;dur=3", {"total": 3}),
        (b"", {}),
    ],
)
def test_server_timing(value: bytes, expected: dict[str, float]) -> None:
    assert parse_server_timing(value) == expected


@pytest.mark.parametrize(
    ("status", "failure", "body", "expected"),
    [
        (503, "", b'{"error": {"code": "overloaded", "message": "full"}}', "503 overloaded"),
        (500, "", b"Internal Server Error", "500"),
        (400, "", b'{"detail": "x"}', "400"),
        (400, "", b"[]", "400"),
        (0, "client_timeout", b"", "client_timeout"),
    ],
)
def test_error_codes(status: int, failure: str, body: bytes, expected: str) -> None:
    assert error_code(status, failure, body) == expected


def load_of(*requests: tuple[float, float, float, int, str], cpu: float | None = 0.3) -> Load:
    """Build a load with the window 10..20 s of (scheduled, sent, ended, status, failure)."""
    records = Records(cpu_seconds=0.001 * len(requests))
    for number, (scheduled, sent, ended, status, failure) in enumerate(requests):
        records.number.append(number)
        records.scheduled.append(scheduled)
        records.sent.append(sent)
        records.ended.append(ended)
        records.status.append(status)
        records.failure.append(failure)
        records.server_timing.append(TIMING if status == 200 else b"")
        records.body.append(b'{"error": {"code": "overloaded"}}' if status == 503 else b"")
    return Load(records, 10, 20, cpu)


def test_latency_counts_from_the_scheduled_time_of_requests_in_the_window() -> None:
    summary = summarize(
        load_of(
            (9, 9, 9.5, 200, ""),  # warm-up
            (11, 13, 14, 200, ""),  # had to wait two seconds for a connection
            (12, 12, 13, 200, ""),
            (19, 19, 24, 200, ""),  # answered after the window: its latency counts
            (21, 21, 22, 200, ""),  # after the window
        )
    )
    assert (summary.requests, summary.answered) == (3, 3)
    assert summary.latency_ms["p50"] == pytest.approx(3000)
    assert summary.latency_ms["max"] == pytest.approx(5000)
    assert summary.latency_ms["mean"] == pytest.approx(3000)
    assert summary.late_ms["max"] == pytest.approx(2000)
    assert summary.client_cpu_ms == pytest.approx(1)


def test_goodput_counts_requests_by_their_part_in_the_window() -> None:
    load = load_of(
        (8, 8, 12, 200, ""),  # half in it
        (12, 12, 13, 200, ""),
        (18, 18, 26, 200, ""),  # a quarter
        (2, 2, 3, 200, ""),
        (15, 15, 16, 503, ""),  # no goodput
    )
    summary = summarize(load, images_per_request=4)
    assert summary.requests_per_second == pytest.approx(1.75 / 10)
    assert summary.images_per_second == pytest.approx(7 / 10)
    assert summary.server_cpu_ms == pytest.approx(300 / 7)


def test_errors_are_counted_by_what_they_are_and_have_no_latency() -> None:
    load = load_of(
        (11, 11, 11.5, 200, ""),
        (12, 12, 12.01, 503, ""),
        (13, 13, 13.02, 503, ""),
        (14, 14, 19, 0, "client_timeout"),
        (5, 5, 6, 503, ""),
    )
    summary = summarize(load)
    assert summary.errors == {"503 overloaded": 2, "client_timeout": 1}
    assert summary.latency_ms["max"] == pytest.approx(500)
    assert summary.rejected_ms["max"] == pytest.approx(20)
    assert summary.phases_ms["decode"]["p50"] == 1.5
    assert set(summary.phases_ms) == {"decode", "queue"}
    text = format_summary(summary)
    assert "503 overloaded: 2, client_timeout: 1" in text
    assert "rejected" in text


def test_nothing_answered_is_reported_and_not_divided_by() -> None:
    summary = summarize(load_of((11, 11, 12, 500, "")))
    assert summary.server_cpu_ms is None
    assert summary.images_per_second == 0
    assert summary.errors == {"500": 1}
    assert summarize(load_of()).requests == 0
    assert "nothing was answered" in format_summary(summarize(load_of()))


def test_unknown_cpu_time_is_said_to_be_unknown() -> None:
    summary = summarize(load_of((11, 11, 12, 200, ""), cpu=None))
    assert summary.server_cpu_ms is None
    assert "unknown (read on Linux" in format_summary(summary)


def test_csv_columns_do_not_depend_on_what_happened() -> None:
    row = csv_row(summarize(load_of((11, 11, 12, 200, ""))))
    assert list(row) == list(csv_row(summarize(load_of())))
    assert row["latency_p50_ms"] == pytest.approx(1000)
    assert row["queue_mean_ms"] == 0.5
    assert row["inference_mean_ms"] is None
