"""GPU memory and utilisation for Prometheus, read through NVML at each scrape; nothing where no NVIDIA driver is."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.engine.thread import EngineThread

try:
    import pynvml
except ImportError:  # the CPU installation does not have it
    pynvml = None

READ_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True)
class Reading:
    """What one GPU said.

    Attributes:
        up: whether it answered; a GPU that has fallen off the bus does not.
        used: bytes of memory; None where it does not tell, as a slice of a divided GPU (MIG) may not.
        total: bytes of memory.
        busy: share of time in which a kernel ran, 0..1; None where the GPU is divided.
    """

    up: bool
    used: int | None = None
    total: int | None = None
    busy: float | None = None


class GpuCollector(Collector):
    """One sample a GPU and metric, labelled with the GPU's number as NVML counts, as of the last `refresh`."""

    def __init__(self) -> None:
        self._gpus = _gpus()
        self._thread = EngineThread("gpu-readings") if self._gpus else None
        self._reading: asyncio.Future[list[Reading]] | None = None
        self._readings: list[Reading] = []

    async def refresh(self) -> None:
        """Read every GPU, in a thread: a driver that hangs must not hold up the requests.

        Where it has not answered within `READ_TIMEOUT_S`, no GPU is up until it does.
        """
        if self._thread is None:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._thread.call(self._read))
        reading = self._reading  # which another scrape may wait for as well
        answered, _ = await asyncio.wait([reading], timeout=READ_TIMEOUT_S)
        self._readings = reading.result() if answered else [Reading(up=False)] * len(self._gpus)

    def _read(self) -> list[Reading]:
        return [read(number) for number in self._gpus]

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the metrics without samples, whether there is a GPU or not."""
        described = {
            "perceiver_gpu_up": "1 while the GPU answers the driver, 0 when it is lost or the driver hangs.",
            "perceiver_gpu_memory_used_bytes": "Bytes in use on the GPU, by all processes.",
            "perceiver_gpu_memory_total_bytes": "Bytes of memory that the GPU has.",
            "perceiver_gpu_utilization_ratio": "Share of time in which a kernel ran, 0..1.",
        }
        return [GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in described.items()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what was read."""
        if not self._readings:
            return
        families = self.describe()
        for number, reading in zip(self._gpus, self._readings, strict=True):
            values = (float(reading.up), reading.used, reading.total, reading.busy)
            for family, value in zip(families, values, strict=True):
                if value is not None:
                    family.add_metric([str(number)], value)
        yield from families


def read(number: int) -> Reading:
    """Ask one GPU, whose handle is got anew: of one that was lost there is none, until it has come back."""
    used = total = busy = None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    except pynvml.NVMLError:
        return Reading(up=False)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        # Of a divided GPU, who was given one slice may not know the whole's.
        if error.value not in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED):
            return Reading(up=False)
    else:
        used, total = memory.used, memory.total
    with suppress(pynvml.NVMLError):
        busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return Reading(True, used, total, busy)


def _gpus() -> list[int]:
    """Return the numbers of the GPUs that this process may use; one that is lost is among them."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        numbers = range(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:  # the library is there and the driver is not
        return []
    return [number for number in numbers if _is_ours(number)]


def _is_ours(number: int) -> bool:
    """Tell whether a GPU may be asked: NVML counts those of others, too."""
    try:
        pynvml.nvmlDeviceGetHandleByIndex(number)
    except pynvml.NVMLError as error:
        return bool(error.value != pynvml.NVML_ERROR_NO_PERMISSION)
    return True
