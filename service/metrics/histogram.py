"""A Prometheus histogram that is cheap to observe: it appends values, and sorts many of them at once."""

from collections.abc import Iterator, Sequence
from time import time
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

MAX_PENDING: Final = 1024


class PendingHistogram(Collector):
    """What `prometheus_client.Histogram` exposes, at a tenth of the cost of an observation. Belongs to one thread.

    Args:
        name: without suffix.
        documentation: one sentence.
        buckets: upper bounds, ascending; +Inf is added.
        registry: the registry that collects it.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = np.asarray(buckets, dtype=np.float64)
        self._labels = [floatToGoString(bound) for bound in (*buckets, float("inf"))]  # type: ignore[no-untyped-call]
        self._counts = np.zeros(len(self._labels), dtype=np.int64)
        self._sum = 0.0
        self._exemplars: list[Exemplar | None] = [None] * len(self._labels)
        self._pending: list[float] = []
        self._request_ids: list[tuple[str, float]] = []
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._pending.append(value)
        if len(self._pending) >= MAX_PENDING:
            self._sort()

    def observe_request(self, value: float, request_id: str) -> None:
        """Count a value, with the request's id as exemplar of its bucket. Do not mix with `observe`."""
        self._request_ids.append((request_id, time()))
        self.observe(value)

    def describe(self) -> Iterator[Metric]:
        """Yield the metric without its samples, for the registry and for docs/reference.md."""
        yield HistogramMetricFamily(self._name, self._documentation)

    def collect(self) -> Iterator[Metric]:
        """Yield the one metric."""
        self._sort()
        cumulative = np.cumsum(self._counts).tolist()
        buckets = [
            (label, float(count)) if exemplar is None else (label, float(count), exemplar)
            for label, count, exemplar in zip(self._labels, cumulative, self._exemplars, strict=True)
        ]
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)

    def _sort(self) -> None:
        """Put the pending values into the buckets."""
        pending, self._pending = self._pending, []
        request_ids, self._request_ids = self._request_ids, []
        if not pending:
            return
        places = np.searchsorted(self._bounds, pending)  # a bound belongs to its bucket
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += sum(pending)
        if request_ids:
            latest = dict(zip(places.tolist(), zip(request_ids, pending, strict=True), strict=True))
            for place, ((request_id, when), value) in latest.items():
                self._exemplars[place] = Exemplar({"request_id": request_id}, value, when)
