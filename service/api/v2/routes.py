"""What the protocol v2 tells of the server and its model: all of its routes but `infer`."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from fastapi import APIRouter

from service import errors
from service.api.paths import INFERENCE, V2, V2_INFER, V2_MODEL, V2_VERSION
from service.api.schemas import CONNECTION_ERRORS, PREDICT_ERRORS, V2Error, error_responses
from service.api.v2.request import check_model
from service.api.v2.tensors import DATATYPES, IMAGES, output_widths
from service.lifecycle import Service
from service.repository.versions import LiveModel

Json = dict[str, Any]
EXTENSIONS: Final = ("binary_tensor_data", "classification", "model_configuration", "statistics")
PLATFORM: Final = "onnxruntime_onnx"
NS: Final = 1e9
TEXT: Final[Json] = {"type": "string"}
NAMED: Final[Json] = {"type": "object", "required": ["name"], "properties": {"name": TEXT, "parameters": {}}}
SHAPED: Final[Json] = {
    "datatype": {"enum": [*DATATYPES.values()]},
    "shape": {"type": "array"},
    "data": {"type": "array"},
}
INFER_BODY: Final[Json] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": TEXT,
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": NAMED | {"properties": NAMED["properties"] | SHAPED}},
        "outputs": {"type": "array", "items": NAMED},
    },
}


def create_v2_router(service: Service, version: str) -> APIRouter:
    """Return the routes of a service of this version."""
    unavailable = [errors.NotReady, errors.Draining]
    kinds = [*CONNECTION_ERRORS, errors.Unauthorized, errors.NotFound, errors.ServiceError, *unavailable]
    responses = error_responses(kinds, V2Error)  # or the other, from a connection, which knows no path yet
    router = APIRouter(tags=["v2"], responses=responses, generate_unique_id_function=lambda route: route.name)

    def get(path: str, endpoint: Callable[..., Any], name: str) -> None:
        router.add_api_route(path, endpoint, methods=["GET"], name=f"v2_{name}")

    def get_of_model(tail: str, answer: Callable[[LiveModel], Json], check: Callable[[], None]) -> None:
        def of(name: str, version: str | None) -> Json:
            check()
            check_model(service.lease(), name, version)
            return answer(service.lease())

        async def of_model(name: str) -> Json:
            return of(name, None)

        async def of_version(name: str, version: str) -> Json:
            return of(name, version)

        operation = tail.strip("/") or "metadata"
        get(f"{V2_MODEL}{tail}", of_model, f"model_{operation}")
        get(f"{V2_VERSION}{tail}", of_version, f"version_{operation}")

    async def server() -> Json:
        """Name, version and extensions."""
        return {"name": "perceiver", "version": version, "extensions": EXTENSIONS}

    async def live() -> Json:
        """200 while the process answers at all."""
        return {"live": True}

    async def ready() -> Json:
        """200 when predictions are served. The specification calls the field `live`, and KServe `ready`."""
        service.check_probed()
        return {"live": True, "ready": True}

    async def all_stats() -> Json:
        """The live model's statistics."""
        service.check_ready()
        return stats_of(service, service.lease())

    async def infer(name: str) -> Json:
        """One input, `images` or `image_bytes`, in JSON or in binary behind it. `InferEndpoint` answers it."""
        raise NotImplementedError

    async def infer_of_version(name: str, version: str) -> Json:
        """The same for a version, which has to be the live one."""
        raise NotImplementedError

    described: list[tuple[str, Callable[..., Any]]] = [(V2_INFER, infer), (f"{V2_VERSION}/infer", infer_of_version)]
    for path, endpoint in described:
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            name=f"v2_{endpoint.__name__}",
            responses=error_responses([*PREDICT_ERRORS, errors.NotFound], V2Error),
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": INFER_BODY}}}},
        )
    get(V2, server, "server")
    get(f"{V2}/health/live", live, "live")
    get(f"{V2}/health/ready", ready, "ready")
    get(f"{V2}/models/stats", all_stats, "stats")
    get_of_model("", metadata_of, service.check_ready)
    get_of_model("/ready", lambda live: {"name": live.metadata.name, "ready": True}, service.check_probed)
    get_of_model("/config", config_of, service.check_ready)
    get_of_model("/stats", lambda live: stats_of(service, live), service.check_ready)

    @router.post(f"{V2}/repository/index", name="v2_index")
    async def index() -> list[Json]:
        """All versions in the model folder; the body is not read."""
        return index_of(service)

    return router


def metadata_of(live: LiveModel) -> Json:
    """Inputs, of which a request has one, and outputs."""
    return {
        "name": live.metadata.name,
        "versions": [str(live.version)],
        "platform": PLATFORM,
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [-1, *dims_of(name, live)]}
            for name, datatype in DATATYPES.items()
        ],
        "outputs": [
            {"name": name, "datatype": "FP32", "shape": [-1, width]}
            for name, width in output_widths(live.metadata).items()
        ],
    }


def dims_of(name: str, live: LiveModel) -> Sequence[int]:
    """Return an input's shape without the images' number."""
    return (*live.metadata.input_size, 3) if name == IMAGES else ()


def config_of(live: LiveModel) -> Json:
    """What Triton's model configuration says, as far as it has a meaning here."""
    return {
        "name": live.metadata.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": live.batcher.max_batch_size,
        "input": [
            {"name": name, "data_type": f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}",
             "dims": dims_of(name, live), "optional": True}
            for name, datatype in DATATYPES.items()
        ],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [width]}
            for name, width in output_widths(live.metadata).items()
        ],
        "dynamic_batching": {},
    }  # fmt: skip


def stats_of(service: Service, live: LiveModel) -> Json:
    """Counts and nanoseconds of this worker since its start, by its metrics; `success` counts requests.

    The time of `success` is the sum of decoding, waiting and running. That of `fail` is not measured. The specification
    wants every step, and perf_analyzer reads them: those that are not here have zeros.
    """
    value = service.metrics.value

    def of(histogram: str) -> Json:
        return {"count": int(value(f"{histogram}_count")), "ns": int(NS * value(f"{histogram}_sum"))}

    steps = {
        "queue": of("perceiver_queue_seconds"),
        "compute_input": of("perceiver_decode_seconds"),
        "compute_infer": of("perceiver_inference_seconds"),
    }
    succeeded = sum(value("perceiver_requests_total", route=path, code="200") for path in INFERENCE)
    success = {"count": int(succeeded), "ns": sum(step["ns"] for step in steps.values())}
    fail = {"count": int(value("perceiver_request_seconds_count") - succeeded), "ns": 0}
    absent = {step: {"count": 0, "ns": 0} for step in ("compute_output", "cache_hit", "cache_miss")}
    stats = {
        "name": live.metadata.name,
        "version": str(live.version),
        "inference_count": int(value("perceiver_images_total") + value("perceiver_explanation_runs_total")),
        "execution_count": steps["compute_infer"]["count"],
        "inference_stats": {"success": success, "fail": fail, **steps, **absent},
        "batch_stats": [],
    }
    return {"model_stats": [stats]}


def index_of(service: Service) -> list[Json]:
    """List the versions; a refused one has its reason."""
    live = service.store.live
    name = "" if live is None else live.metadata.name
    return [
        {
            "name": name if version.metadata is None else version.metadata.name,
            "version": str(version.number),
            "state": "READY" if version.state == "live" else "UNAVAILABLE",
            "reason": version.public_reason,
        }
        for version in service.store.versions()
    ]
