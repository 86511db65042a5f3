"""GPU memory and utilisation for Prometheus, read through NVML at each scrape; nothing where no NVIDIA driver is."""

from collections.abc import Iterator
from contextlib import suppress

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

try:
    import pynvml
except ImportError:  # the CPU installation does not have it
    pynvml = None


class GpuCollector(Collector):
    """One sample a GPU and metric, labelled with the GPU's number as NVML counts."""

    def __init__(self) -> None:
        self.handles = _handles()

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the metrics without samples, whether there is a GPU or not."""
        described = {
            "perceiver_gpu_memory_used_bytes": "Bytes in use on the GPU, by all processes.",
            "perceiver_gpu_memory_total_bytes": "Bytes of memory that the GPU has.",
            "perceiver_gpu_utilization_ratio": "Share of time in which a kernel ran, 0..1.",
        }
        return [GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in described.items()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read every GPU."""
        if not self.handles:
            return
        used, total, busy = self.describe()
        for index, handle in enumerate(self.handles):
            # A GPU that has fallen off the bus has no samples, and that is the alarm. One that is divided (MIG) can't
            # tell how busy it is.
            with suppress(pynvml.NVMLError):
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                used.add_metric([str(index)], memory.used)
                total.add_metric([str(index)], memory.total)
            with suppress(pynvml.NVMLError):
                busy.add_metric([str(index)], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        yield from (used, total, busy)


def _handles() -> list[object]:
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # the library is there and the driver is not
        return []
