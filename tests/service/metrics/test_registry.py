"""The exposition: which metrics there are, their labels' bounds, exemplars."""

import asyncio
import threading
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from service.api.paths import INFERENCE
from service.errors import ServiceError
from service.metrics import gpu
from service.metrics.registry import SECONDS, Metrics
from tests.fakes import FakeEngine, tiny_metadata
from tests.service.harness import Running, png, running

FAMILIES = {
    "perceiver_requests": "counter",
    "perceiver_request_seconds": "histogram",
    "perceiver_decode_seconds": "histogram",
    "perceiver_queue_seconds": "histogram",
    "perceiver_inference_seconds": "histogram",
    "perceiver_batch_size": "histogram",
    "perceiver_images": "counter",
    "perceiver_unfamiliar_images": "counter",
    "perceiver_explanations": "counter",
    "perceiver_explanation_runs": "counter",
    "perceiver_failed_batches": "counter",
    "perceiver_rejections": "counter",
    "perceiver_decode_process_ends": "counter",
    "perceiver_deadline_misses": "counter",
    "perceiver_cancellations": "counter",
    "perceiver_model_info": "gauge",
    "perceiver_model_reloads": "counter",
    "perceiver_model_refused_versions": "gauge",
    "perceiver_golden_max_abs_difference": "gauge",
    "perceiver_ready": "gauge",
    "perceiver_queue_length": "gauge",
    "perceiver_max_queue_size": "gauge",
    "perceiver_max_batch_size": "gauge",
    "perceiver_admitted_images": "gauge",
    "perceiver_admitted_background_images": "gauge",
    "perceiver_admitted_bytes": "gauge",
}


def test_every_metric_is_there_with_its_type_and_a_description() -> None:
    text = Metrics().exposition("")[0].decode()
    families = {family.name: family for family in parse_classic(text)}
    found = {name: family.type for name, family in families.items() if name.startswith("perceiver_")}
    found = {name.removesuffix("_total"): kind for name, kind in found.items() if not name.endswith("_created")}
    assert found == FAMILIES
    assert all(family.documentation for family in families.values())
    assert any(name.startswith("python_gc") for name in families)


def test_what_the_service_is_to_blame_for_is_counted_from_zero() -> None:
    lines = Metrics().exposition("")[0].decode().splitlines()
    blamed = {error for error in errors_below(ServiceError) if error.status >= 500 and error.status != 501}
    for route in INFERENCE:
        for status in {200} | {error.status for error in blamed}:
            assert f'perceiver_requests_total{{code="{status}",route="{route}"}} 0.0' in lines
    for error in blamed:
        assert f'perceiver_rejections_total{{reason="{error.code}"}} 0.0' in lines


def errors_below(error: type[ServiceError]) -> set[type[ServiceError]]:
    return {error}.union(*map(errors_below, error.__subclasses__()))


def test_buckets_reach_from_half_a_millisecond_to_ten_seconds() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.0005, 10.0)


def test_no_metric_is_shared_between_two_services() -> None:
    first, second = Metrics(), Metrics()
    first.batch(3, 0.1, is_background=False)
    assert "perceiver_images_total 3.0" in first.exposition("")[0].decode()
    assert "perceiver_images_total 0.0" in second.exposition("")[0].decode()


def test_reports_of_the_batcher_and_the_store_are_counted() -> None:
    metrics = Metrics()
    metrics.batch(4, 0.02, is_background=False)
    metrics.batch(7, 0.3, is_background=True)
    metrics.queued(0.001)
    metrics.dropped("cancelled")
    metrics.dropped("deadline")
    metrics.dropped("deadline")
    metrics.failed_batch(2)
    metrics.model_refused(2, "why")
    metrics.golden_checked(0.25)
    metrics.model_live(1, tiny_metadata(), "cpu")
    metrics.model_live(3, tiny_metadata(precision="float16"), "cuda")
    lines = metrics.exposition("")[0].decode().splitlines()
    for line in [
        "perceiver_images_total 4.0",
        "perceiver_explanation_runs_total 7.0",
        "perceiver_batch_size_sum 11.0",
        'perceiver_inference_seconds_bucket{le="0.025"} 1.0',
        "perceiver_queue_seconds_count 1.0",
        "perceiver_cancellations_total 1.0",
        "perceiver_deadline_misses_total 2.0",
        "perceiver_failed_batches_total 1.0",
        'perceiver_model_reloads_total{result="loaded"} 2.0',
        'perceiver_model_reloads_total{result="refused"} 1.0',
        "perceiver_golden_max_abs_difference 0.25",
        'perceiver_model_info{name="tiny",precision="float16",provider="cuda",version="3"} 1.0',
    ]:
        assert line in lines
    assert sum(line.startswith("perceiver_model_info{") for line in lines) == 1


async def exposition(run: Running, accept: str) -> tuple[str, str]:
    response = await run.client.get("/metrics", headers={"accept": accept})
    return response.headers["content-type"], response.text


async def test_openmetrics_where_it_is_asked_for_with_exemplars(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.client.post(
            "/predict", content=png(1), headers={"content-type": "image/png", "x-request-id": "find-me"}
        )
        kind, text = await exposition(run, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        assert kind.startswith("application/openmetrics-text")
        families = {family.name: family for family in parse_openmetrics(text)}
        exemplars = [sample.exemplar for sample in families["perceiver_request_seconds"].samples if sample.exemplar]
        assert [exemplar.labels for exemplar in exemplars] == [{"request_id": "find-me"}]
        assert families["perceiver_ready"].samples[0].value == 1


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "application/json", "text/plain;version=9.x;escaping=?"])
async def test_the_classic_text_otherwise(tmp_path: Path, accept: str) -> None:
    async with running(tmp_path) as run:
        kind, text = await exposition(run, accept)
        assert kind.startswith("text/plain; version=0.0.4")
        assert "find-me" not in text
        assert {family.name for family in parse_classic(text)} >= {"perceiver_ready"}


async def test_a_junk_version_in_the_accept_header_is_no_error(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        kind, _ = await exposition(run, "application/openmetrics-text;version=a.b.c;escaping=x\x01".replace("\x01", ""))
        assert kind.startswith("application/openmetrics-text")


async def test_the_largest_batch_is_read_at_each_scrape(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=8)
    async with running(tmp_path, engine) as run:
        assert await run.metric("perceiver_max_batch_size") == 8
        engine.max_batch_size = 4  # as when memory runs out
        assert await run.metric("perceiver_max_batch_size") == 4


async def test_labels_are_bounded_whatever_clients_send(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for number in range(20):
            await run.client.get(f"/path-{number}")
            await run.client.request(f"METHOD{number}", f"/{number}", headers={"x-request-id": f"id-{number}"})
        text = (await exposition(run, "text/plain"))[1]
        assert 'perceiver_requests_total{code="404",route="other"}' in text
        assert "path-" not in text
        assert "METHOD" not in text
        assert "id-" not in text


async def test_requests_are_timed_and_counted_by_route_and_code(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=8)
    async with running(tmp_path, engine) as run:
        engine.hold()
        tasks = [asyncio.create_task(run.predict(0))]
        await run.until(lambda: engine.batches == [[0]])
        tasks += [asyncio.create_task(run.predict(number)) for number in (1, 2)]
        await run.until(lambda: run.service.queue_length == 2)
        assert await run.metric("perceiver_admitted_images") == 3
        assert await run.metric("perceiver_admitted_bytes") > 0
        assert await run.metric("perceiver_queue_length") == 2
        engine.release(2)
        await asyncio.gather(*tasks)
        await run.client.post("/predict")
        for name, value in {
            'perceiver_requests_total{code="200",route="/predict"}': 3,
            'perceiver_requests_total{code="400",route="/predict"}': 1,
            "perceiver_request_seconds_count": 4,
            "perceiver_decode_seconds_count": 3,
            "perceiver_queue_seconds_count": 3,
            "perceiver_images_total": 3,
            "perceiver_batch_size_count": 2,
            "perceiver_admitted_images": 0,
            "perceiver_queue_length": 0,
        }.items():
            assert await run.metric(name) == value, name


class FakeNvml:
    """Four GPUs: one, one that has fallen off the bus, one that is divided, and a slice of one.

    A divided one has no utilisation, and a slice of one no memory size either.
    """

    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_GPU_IS_LOST = 3, 4, 15

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.value = value

    class Memory:
        used, total = 3 << 30, 16 << 30

    class Rates:
        gpu = 42

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver
        self.without_handle: dict[int, int] = {}  # the error of each
        self.answers = threading.Event()
        self.answers.set()

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if not self.driver:
            raise self.NVMLError(9)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.without_handle:
            raise self.NVMLError(self.without_handle[index])
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:  # noqa: N802
        self.answers.wait()
        if handle in (1, 3):
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST if handle == 1 else self.NVML_ERROR_NO_PERMISSION)
        return self.Memory()

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Rates:  # noqa: N802
        if handle != 0:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return self.Rates()


def gpu_samples(collector: gpu.GpuCollector) -> dict[tuple[str, str], float]:
    return {
        (sample.name.removeprefix("perceiver_gpu_"), sample.labels["gpu"]): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


async def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pynvml", FakeNvml())
    collector = gpu.GpuCollector()
    await collector.refresh()
    assert gpu_samples(collector) == {
        ("up", "0"): 1,
        ("memory_used_bytes", "0"): 3 << 30,
        ("memory_total_bytes", "0"): 16 << 30,
        ("utilization_ratio", "0"): 0.42,
        ("up", "1"): 0,
        ("up", "2"): 1,
        ("memory_used_bytes", "2"): 3 << 30,
        ("memory_total_bytes", "2"): 16 << 30,
        ("up", "3"): 1,
    }


async def test_a_gpu_that_was_lost_before_the_start_or_is_somebody_elses_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVML counts both, and has a handle of neither."""
    nvml = FakeNvml()
    nvml.without_handle = {0: nvml.NVML_ERROR_GPU_IS_LOST, 1: nvml.NVML_ERROR_NO_PERMISSION}
    monkeypatch.setattr(gpu, "pynvml", nvml)
    collector = gpu.GpuCollector()

    async def up() -> dict[str, float]:
        await collector.refresh()
        return {number: value for (name, number), value in gpu_samples(collector).items() if name == "up"}

    assert await up() == {"0": 0, "2": 1, "3": 1}
    nvml.without_handle = {3: nvml.NVML_ERROR_NO_PERMISSION}  # which was there
    assert await up() == {"0": 1, "2": 1, "3": 0}


async def test_a_driver_that_hangs_blocks_nothing_and_is_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", nvml)
    monkeypatch.setattr(gpu, "READ_TIMEOUT_S", 0.05)
    async with running(tmp_path) as run:
        assert await run.metric('perceiver_gpu_up{gpu="0"}') == 1
        nvml.answers.clear()
        for _ in range(2):
            assert await run.metric('perceiver_gpu_up{gpu="0"}') == 0
            assert 'perceiver_gpu_memory_used_bytes{gpu="0"}' not in (await run.client.get("/metrics")).text
        assert (await run.predict()).status_code == 200
        nvml.answers.set()
        while await run.metric('perceiver_gpu_up{gpu="0"}') == 0:  # noqa: ASYNC110 - as a scraper does
            await asyncio.sleep(0.01)
        assert await run.metric('perceiver_gpu_memory_used_bytes{gpu="0"}') == 3 << 30


@pytest.mark.parametrize("nvml", [None, FakeNvml(driver=False)], ids=["no library", "no driver"])
async def test_without_a_gpu_there_are_no_gpu_metrics(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    monkeypatch.setattr(gpu, "pynvml", nvml)
    collector = gpu.GpuCollector()
    await collector.refresh()
    assert list(collector.collect()) == []
