"""Every Prometheus metric of the service, with its buckets, in one private registry.

Label values are bounded whatever clients send: a route is one of the app's or "other", a reason is an error code.
"""

from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector

from service.engine.metadata import ModelMetadata
from service.errors import (
    DeadlineExceeded,
    DecodingFailed,
    Draining,
    FolderUnavailable,
    InferenceFailed,
    NotReady,
    Overloaded,
    ServiceError,
    Unavailable,
)
from service.metrics.gpu import GpuCollector
from service.metrics.histogram import PendingHistogram

# 0.5 ms to 10 s: from an idle service with a small model to the default timeout.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

OPENMETRICS = "application/openmetrics-text"
# The service's fault, and not a client's.
OWN_ERRORS = (
    *(ServiceError, DecodingFailed, InferenceFailed, DeadlineExceeded),
    *(Unavailable, Overloaded, FolderUnavailable, NotReady, Draining),
)


class Metrics:
    """The service's metrics; also the observer of the batcher and the model store."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(PendingHistogram, registry=registry)
        seconds = partial(histogram, buckets=SECONDS)
        self.requests = counter(
            "perceiver_requests",
            "HTTP requests that were read, by route and status code; earlier responses count as rejections only.",
            ["route", "code"],
        )
        self.request_seconds = seconds(
            "perceiver_request_seconds",
            "Seconds from the headers of a request to /predict, /embed or infer to its response, whatever its status.",
        )
        self.decode_seconds = seconds(
            "perceiver_decode_seconds",
            "Seconds a request took from its last byte to arrays, the wait for a decode process included.",
        )
        self.queue_seconds = seconds("perceiver_queue_seconds", "Seconds an image waited for its batch.")
        self.inference_seconds = seconds("perceiver_inference_seconds", "Seconds of one run of the model.")
        self.batch_size = histogram("perceiver_batch_size", "Images in one run of the model.", buckets=IMAGES)
        self.images = counter("perceiver_images", "Images that the model has run, but for explanations.")
        self.unfamiliar_images = counter(
            "perceiver_unfamiliar_images", "Images unlike those of the training, not counting those of explanations."
        )
        self.explanations = counter("perceiver_explanations", "Images explained.")
        self.explanation_runs = counter("perceiver_explanation_runs", "Images that the model has run for explanations.")
        self.failed_batches = counter("perceiver_failed_batches", "Runs of the model that failed.")
        self.rejections = counter("perceiver_rejections", "Requests answered with an error, by its code.", ["reason"])
        # Alarms and panels use these, and Prometheus sees no increase in a counter that begins with its first event.
        for error in OWN_ERRORS:
            self.rejections.labels(error.code)
        for route in ("/predict", "/embed", "/v2/models/{name}/infer"):
            for status in {200, *(error.status for error in OWN_ERRORS)}:
                self.requests.labels(route, status)
        self.deadline_misses = counter(
            "perceiver_deadline_misses", "Images dropped from the queue because their deadline had passed."
        )
        self.cancellations = counter(
            "perceiver_cancellations", "Images dropped from the queue because their client had left."
        )
        self.model_info = gauge(
            "perceiver_model_info", "1 for the model that serves.", ["name", "version", "provider", "precision"]
        )
        self.reloads = counter("perceiver_model_reloads", "Model versions loaded, by result.", ["result"])
        self.refused_versions = gauge(
            "perceiver_model_refused_versions",
            "Versions in the model folder that would serve in place of the live one, and were refused.",
        )
        self.golden_difference = gauge(
            "perceiver_golden_max_abs_difference",
            "Largest difference of a logit on the golden images, at the last check that passed or failed.",
        )
        self.ready = gauge("perceiver_ready", "1 while /health/ready returns 200.")
        self.queue_length = gauge("perceiver_queue_length", "Images waiting for a batch.")
        self.admitted_images = gauge("perceiver_admitted_images", "Images accepted and not yet answered.")
        self.admitted_background_images = gauge(
            "perceiver_admitted_background_images", "Those of them for explanations, which wait until no others do."
        )
        self.admitted_bytes = gauge("perceiver_admitted_bytes", "Bytes of the request bodies that are held.")
        self.max_queue_size = gauge("perceiver_max_queue_size", "Images that may be accepted and not yet answered.")
        self.max_batch_size = gauge(
            "perceiver_max_batch_size",
            "Images that one run may have now: the setting, or less since a CPU was measured or memory ran out.",
        )
        self.decode_process_ends = counter(
            "perceiver_decode_process_ends",
            "Decode processes that have ended and were replaced, by reason.",
            ["reason"],
        )
        for reason in ("cpu_limit", "time_limit", "abandoned", "died"):
            self.decode_process_ends.labels(reason)
        self._request_counters: dict[tuple[str, int], Counter] = {}  # labels() checks its arguments on each call
        for result in ("loaded", "refused"):
            self.reloads.labels(result)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.gpus = GpuCollector()
        registry.register(self.gpus)

    # Requests

    def request(self, route: str, status: int) -> None:
        """Count an answered request."""
        key = (route, status)
        counter = self._request_counters.get(key)
        if counter is None:
            counter = self._request_counters[key] = self.requests.labels(*key)
        counter.inc()

    def predicted(self, seconds: float, request_id: str) -> None:
        """Time one request for inference; its id becomes the exemplar of its bucket."""
        self.request_seconds.observe_request(seconds, request_id)

    def decoded(self, seconds: float) -> None:
        """Time the decoding of one request's images."""
        self.decode_seconds.observe(seconds)

    def decode_process_ended(self, reason: str) -> None:
        """Count a decode process that was killed or has crashed."""
        self.decode_process_ends.labels(reason).inc()

    def explained(self, images: int) -> None:
        """Count explained images."""
        self.explanations.inc(images)

    def rejected(self, code: str) -> None:
        """Count a request that ended in an error."""
        self.rejections.labels(code).inc()

    # The batcher

    def batch(self, size: int, seconds: float, *, is_background: bool) -> None:
        """Count one run of the model, for explanations or for others: never for both."""
        self.batch_size.observe(size)
        self.inference_seconds.observe(seconds)
        (self.explanation_runs if is_background else self.images).inc(size)

    def unfamiliar(self, images: int) -> None:
        """Count images that were unlike the training images."""
        self.unfamiliar_images.inc(images)

    def queued(self, seconds: float) -> None:
        """Time one image's wait."""
        self.queue_seconds.observe(seconds)

    def dropped(self, reason: Literal["cancelled", "deadline"]) -> None:
        """Count one image that was not run."""
        (self.cancellations if reason == "cancelled" else self.deadline_misses).inc()

    def failed_batch(self, size: int) -> None:
        """Count one run that failed."""
        self.failed_batches.inc()

    # The models

    def model_live(self, version: int, metadata: ModelMetadata, provider: str) -> None:
        """Set the model that serves, and count it as loaded."""
        self.model_info.clear()
        self.model_info.labels(metadata.name, version, provider, metadata.precision).set(1)
        self.reloads.labels("loaded").inc()

    def model_refused(self, version: int, reason: str) -> None:
        """Count a version that failed; the log and `/models` have the reason."""
        self.reloads.labels("refused").inc()

    def golden_checked(self, max_abs_difference: float) -> None:
        """Set the difference of the last golden check."""
        self.golden_difference.set(max_abs_difference)

    def value(self, name: str, **labels: str) -> float:
        """Return a sample's value; 0 where there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their content type: OpenMetrics if `accept` names it, else the classic text."""
        # Versions and escapings in the header are ignored: it is untrusted, and one form is enough.
        encode, content_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept else "")
        return encode(self.registry), content_type
