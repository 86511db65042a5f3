"""What the operating system knows of the processes that speak HTTP; of the model's own, `ProcessCollector` tells it."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ["process"]


class HttpProcessCollector(Collector):
    """CPU time, memory and open files of each process that speaks HTTP, under its number.

    Args:
        registry: that collects it.

    Attributes:
        pids: returns the process id of each that runs, by number.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.pids: Callable[[], Mapping[int, int]] = dict
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the families without values."""
        yield from families().values()

    def collect(self) -> Iterator[Metric]:
        """Yield the families; what has ended since has no values."""
        found = families()
        for number, pid in self.pids().items():
            for known in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                if known.name in found:
                    found[known.name].add_metric([str(number)], known.samples[0].value)
        yield from found.values()


def families() -> dict[str, CounterMetricFamily | GaugeMetricFamily]:
    """Return the families without values, by the names that `ProcessCollector` gives theirs."""
    return {
        "process_cpu_seconds": CounterMetricFamily(
            "perceiver_http_process_cpu_seconds", "CPU seconds of an HTTP process, by its number.", labels=LABELS
        ),
        "process_resident_memory_bytes": GaugeMetricFamily(
            "perceiver_http_process_resident_memory_bytes", "Memory of an HTTP process, by its number.", labels=LABELS
        ),
        "process_open_fds": GaugeMetricFamily(
            "perceiver_http_process_open_fds",
            "Open files and connections of an HTTP process, by its number.",
            labels=LABELS,
        ),
    }
