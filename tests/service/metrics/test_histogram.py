"""The histogram that sorts its values in one go, against the library's."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from service.metrics import histogram
from service.metrics.histogram import PendingHistogram

BOUNDS = (0.01, 0.1, 1.0)
VALUES = st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 10, width=16)), max_size=20)


def expositions(values: Sequence[float]) -> tuple[bytes, bytes]:
    """The expositions of ours and the library's after these values, each observed after a scrape or not."""
    registries = CollectorRegistry(), CollectorRegistry()
    ours = PendingHistogram("seconds", "What it is.", BOUNDS, registries[0])
    theirs = Histogram("seconds", "What it is.", buckets=BOUNDS, registry=registries[1])
    for value in values:
        ours.observe(value)
        theirs.observe(value)
        if value > 1:
            generate_latest(registries[0])
    return tuple(without_created(generate_latest(registry)) for registry in registries)  # type: ignore[return-value]


def without_created(text: bytes) -> bytes:
    return b"\n".join(line for line in text.splitlines() if b"_created" not in line)


@given(values=VALUES)
def test_it_exposes_what_the_library_exposes(values: list[float]) -> None:
    ours, theirs = expositions(values)
    # Each adds the values in an order of its own: the sums may differ in the last digit.
    assert [line for line in ours.splitlines() if b"_sum" not in line] == [
        line for line in theirs.splitlines() if b"_sum" not in line
    ]
    sums = [
        float(line.split()[1])
        for text in (ours, theirs)
        for line in text.splitlines()
        if line.startswith(b"seconds_sum")
    ]
    assert sums[0] == pytest.approx(sums[1])


def test_pending_values_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "MAX_PENDING", 10)
    registry = CollectorRegistry()
    one = PendingHistogram("seconds", "What it is.", BOUNDS, registry)
    for number in range(25):
        one.observe_request(0.05, f"id-{number}")
    assert len(one._pending) == len(one._request_ids) == 5
    assert registry.get_sample_value("seconds_count") == 25


def test_the_last_request_of_each_bucket_is_its_exemplar_at_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100, 105))
    monkeypatch.setattr(histogram, "time", lambda: next(seconds))
    registry = CollectorRegistry()
    one = PendingHistogram("seconds", "What it is.", BOUNDS, registry)
    for value, request_id in ((0.005, "a"), (0.5, "b"), (0.007, "c"), (0.9, "d"), (0.01, "e")):
        one.observe_request(value, request_id)
    lines = openmetrics.generate_latest(registry).decode().splitlines()
    found = {line.split()[0]: line.partition(" # ")[2] for line in lines if "_bucket" in line}
    assert found == {
        'seconds_bucket{le="0.01"}': '{request_id="e"} 0.01 104',
        'seconds_bucket{le="0.1"}': "",
        'seconds_bucket{le="1.0"}': '{request_id="d"} 0.9 103',
        'seconds_bucket{le="+Inf"}': "",
    }


def test_two_of_one_name_are_refused() -> None:
    registry = CollectorRegistry()
    PendingHistogram("seconds", "What it is.", BOUNDS, registry)
    with pytest.raises(ValueError, match="Duplicated"):
        PendingHistogram("seconds", "What it is.", BOUNDS, registry)
