"""All routes: HTTP in, one call, HTTP out. Of those for inference there is the description alone."""

from fastapi import APIRouter, Request, Response

from service import errors
from service.api.paths import EMBED, EXPLAIN, PREDICT
from service.api.schemas import (
    CONNECTION_ERRORS,
    EMBED_ERRORS,
    EMBEDDED,
    EXPLAIN_ERRORS,
    EXPLAINED,
    INFERENCE_PARAMETERS,
    LABEL,
    NORMALIZE,
    PREDICT_ERRORS,
    PREDICTED,
    TOP_K,
    EmbedResponse,
    ErrorResponse,
    ExplainResponse,
    HealthResponse,
    ModelsResponse,
    PredictResponse,
    QueueState,
    StatusResponse,
    VersionResponse,
    content_of,
    error_responses,
    inference_bodies,
)
from service.explanation.masks import RUNS
from service.lifecycle import Service
from service.repository.versions import VersionRecord
from service.settings import Settings

NOT_READY = error_responses([errors.Unavailable, errors.NotReady, errors.Draining])
KEYED = error_responses([errors.Unauthorized])
FAILED = error_responses([*CONNECTION_ERRORS, errors.NotReady, errors.ServiceError])
NOT_HEALTHY: dict[int | str, dict[str, object]] = {
    503: {
        "content": content_of(HealthResponse, ErrorResponse),
        "description": "Not ready; an error where nobody can say why.",
    }
}


def create_router(service: Service) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter(responses=FAILED, generate_unique_id_function=lambda route: route.name)
    add_inference(router, service.settings)
    add_health(router, service)
    add_models(router, service)

    @router.get("/metrics", tags=["operation"], response_class=Response, responses=METRICS)
    async def metrics(request: Request) -> Response:
        """All metrics for Prometheus; OpenMetrics with exemplars where the Accept header asks for it."""
        if service.settings.workers > 1 and service.settings.management_port is None:
            raise errors.NotFound("Each worker has metrics of its own; set management_port, and ask each there.")
        await service.metrics.gpus.refresh()
        body, content_type = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return router


METRICS: dict[int | str, dict[str, object]] = {
    200: {
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "application/openmetrics-text": {"schema": {"type": "string"}},
        }
    }
}


def add_inference(router: APIRouter, settings: Settings) -> None:
    """Describe the paths for inference, which their endpoints answer before a router is asked."""
    max_images = settings.max_images
    max_explained = max(1, min(max_images, settings.explain_max_runs // (1 + RUNS)))

    @router.post(
        PREDICT,
        tags=["predict"],
        summary="Classify one or several images",
        responses=PREDICTED | error_responses(PREDICT_ERRORS),
        openapi_extra={
            "parameters": [TOP_K, *INFERENCE_PARAMETERS],
            "requestBody": {"required": True, "content": inference_bodies(max_images, "top_k")},
        },
    )
    async def predict() -> PredictResponse:
        """JPEG, PNG, WebP, BMP, GIF (first frame) or TIFF, in any of the bodies below."""
        raise NotImplementedError

    @router.post(
        EXPLAIN,
        tags=["explain"],
        summary="Show which regions of an image carry its label",
        responses=EXPLAINED | error_responses(EXPLAIN_ERRORS),
        openapi_extra={
            "parameters": [LABEL, *INFERENCE_PARAMETERS],
            "requestBody": {"required": True, "content": inference_bodies(max_explained, "label")},
        },
    )
    async def explain() -> ExplainResponse:
        """Covers parts of the image and asks the model again; other requests wait for one batch of that at most."""
        raise NotImplementedError

    @router.post(
        EMBED,
        tags=["embed"],
        summary="Turn images into vectors",
        responses=EMBEDDED | error_responses(EMBED_ERRORS),
        openapi_extra={
            "parameters": [NORMALIZE, *INFERENCE_PARAMETERS],
            "requestBody": {"required": True, "content": inference_bodies(max_images, "normalize")},
        },
    )
    async def embed() -> EmbedResponse:
        """What the model classifies: images that look alike to it have vectors of a high cosine."""
        raise NotImplementedError


def add_health(router: APIRouter, service: Service) -> None:
    """Add the probes."""

    @router.get("/health", tags=["operation"], responses=NOT_HEALTHY)
    async def health(response: Response) -> HealthResponse:
        """Summary for people; 200 when predictions are served, 503 otherwise."""
        response.status_code = 200 if service.probed_status == "ready" else 503
        return health_of(service)

    @router.get("/health/live", tags=["operation"])
    async def live() -> StatusResponse:
        """200 while the process answers at all."""
        return StatusResponse(status="live")

    @router.get("/health/ready", tags=["operation"], responses=NOT_READY)
    async def ready() -> StatusResponse:
        """200 when predictions are served: not before the golden check has passed, nor while draining."""
        service.check_probed()
        return StatusResponse(status="ready")


def add_models(router: APIRouter, service: Service) -> None:
    """Add the routes about model versions."""

    @router.get("/models", tags=["models"], responses=KEYED)
    async def models() -> ModelsResponse:
        """All versions in the model folder, which of them serves, and why one was refused."""
        return models_of(service, service.store.versions())

    unavailable = [errors.Unavailable, errors.FolderUnavailable, errors.NotReady]
    reloading = KEYED | error_responses([errors.ReloadDisabled, *unavailable])

    @router.post("/models/reload", tags=["models"], responses=reloading)
    async def reload() -> ModelsResponse:
        """Look into the model folder now instead of at the next poll; needs the admin key."""
        try:
            records = await service.store.reload()
        except OSError as error:
            raise errors.FolderUnavailable(f"The model folder can't be looked into: {error.strerror}.") from error
        return models_of(service, records)


def health_of(service: Service) -> HealthResponse:
    """Summarise."""
    live, admission = service.store.live, service.admission
    return HealthResponse(
        status=service.probed_status,
        model=None if live is None else live.metadata.name,
        version=None if live is None else live.version,
        provider=None if live is None else live.provider,
        queue=QueueState(
            waiting=service.queue_length,
            images=service.admission.images,
            max_images=admission.max_images,
            bytes=service.admission.bytes,
            max_bytes=admission.max_bytes,
        ),
    )


def models_of(service: Service, records: list[VersionRecord]) -> ModelsResponse:
    """Describe all versions."""
    live = service.store.live
    return ModelsResponse(
        live=None if live is None else live.version,
        versions=[
            VersionResponse(
                version=record.number, state=record.state, reason=record.public_reason or None, metadata=record.metadata
            )
            for record in records
        ],
    )
