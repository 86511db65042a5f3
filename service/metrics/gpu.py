"""GPU memory and utilisation for Prometheus, read through NVML at each scrape; no metrics without a driver."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.engine.thread import EngineThread

try:
    import pynvml
except ImportError:  # the CPU installation does not have it
    pynvml = None

READ_TIMEOUT_S: Final = 1.0


METRICS: Final = {
    "perceiver_gpu_up": "1 while the GPU answers the driver, 0 when it is lost or the driver hangs.",
    "perceiver_gpu_memory_used_bytes": "Bytes in use on the GPU, by all processes.",
    "perceiver_gpu_memory_total_bytes": "Bytes of memory that the GPU has.",
    "perceiver_gpu_utilization_ratio": "Share of time in which a kernel ran, 0..1.",
}
Reading = dict[str, float]  # of one GPU, by metric; a divided GPU and a slice of one (MIG) do not have all of them
DOWN: Final[Reading] = {"perceiver_gpu_up": 0}


class GpuCollector(Collector):
    """Exposes one sample for each GPU and metric as of the last `refresh`, labelled with NVML's GPU number."""

    def __init__(self) -> None:
        self._gpus = _gpus()
        self._thread = EngineThread("gpu-readings") if self._gpus else None
        self._reading: asyncio.Future[list[Reading]] | None = None
        self._readings: list[Reading] = []

    async def refresh(self) -> None:
        """Read every GPU in a thread, since a driver that hangs must not block requests.

        After `READ_TIMEOUT_S` without an answer all GPUs count as down until it comes.
        """
        if self._thread is None:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._thread.call(self._read))
        reading = self._reading  # another scrape may wait for it as well
        answered, _ = await asyncio.wait([reading], timeout=READ_TIMEOUT_S)
        self._readings = reading.result() if answered else [DOWN] * len(self._gpus)

    def _read(self) -> list[Reading]:
        return [read(number) for number in self._gpus]

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the metrics without samples, with or without a GPU."""
        return [GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in METRICS.items()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the last readings."""
        if not self._readings:
            return
        for family in self.describe():
            for number, reading in zip(self._gpus, self._readings, strict=True):
                if family.name in reading:
                    family.add_metric([str(number)], reading[family.name])
            yield family


def read(number: int) -> Reading:
    """Read one GPU. Its handle is got each time, since a lost GPU has none until it is back."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    except pynvml.NVMLError:
        return DOWN
    reading: Reading = {"perceiver_gpu_up": 1}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        # A process with one slice of a divided GPU may not read the whole's memory.
        if error.value not in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED):
            return DOWN
    else:
        reading |= {"perceiver_gpu_memory_used_bytes": memory.used, "perceiver_gpu_memory_total_bytes": memory.total}
    with suppress(pynvml.NVMLError):
        reading["perceiver_gpu_utilization_ratio"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return reading


def _gpus() -> list[int]:
    """Return the numbers of the GPUs that this process may use, lost ones included."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        numbers = range(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:  # the library is installed, and no driver
        return []
    return [number for number in numbers if _is_ours(number)]


def _is_ours(number: int) -> bool:
    """Return whether this process may read a GPU; NVML also counts those of other containers."""
    try:
        pynvml.nvmlDeviceGetHandleByIndex(number)
    except pynvml.NVMLError as error:
        return bool(error.value != pynvml.NVML_ERROR_NO_PERMISSION)
    return True
