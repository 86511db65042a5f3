"""The paths of the HTTP API."""

import re
from typing import Final

PREDICT: Final = "/predict"
PAGE: Final = "/"
DOCS: Final = "/docs"
PAGE_FILES: Final = "/page/"  # and a name: what both pages load
EXPLAIN: Final = "/explain"
EMBED: Final = "/embed"
V2: Final = "/v2"
V2_MODEL: Final = f"{V2}/models/{{name}}"
V2_VERSION: Final = f"{V2_MODEL}/versions/{{version}}"
V2_INFER: Final = f"{V2_MODEL}/infer"
PATHS: Final = frozenset(
    {PREDICT, EXPLAIN, EMBED, "/health", "/health/live", "/health/ready", "/metrics", "/models", "/models/reload"}
    | {PAGE, DOCS, "/openapi.json"}
    | {V2, f"{V2}/health/live", f"{V2}/health/ready", f"{V2}/models/stats", f"{V2}/repository/index"}
)
# What dashboard and alarms call requests for inference. Explanations take what others leave, and have no objective.
INFERENCE: Final = frozenset({PREDICT, EMBED, V2_INFER})
V2_MODEL_PATH: Final = re.compile(rf"{V2}/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready|/config|/stats|)")
# With a management port, clients do not see these, and operators see nothing else. `known_path` gives their form.
MANAGEMENT: Final = frozenset(
    {"/health", "/health/live", "/health/ready", "/metrics", "/models", "/models/reload"}
    | {f"{V2}/models/stats", f"{V2_MODEL}/stats", f"{V2}/repository/index"}
)


def known_path(path: str) -> str:
    """Return the path, or "other": what clients send must not become ever new label values.

    A path of the protocol v2 has the model's name replaced, and no version. A page's files count as one.
    """
    if path in PATHS:
        return path
    if path.startswith(PAGE_FILES):
        return PAGE_FILES
    match = V2_MODEL_PATH.fullmatch(path)
    return "other" if match is None else f"{V2_MODEL}{match[3]}"


def is_v2(path: str) -> bool:
    """Whether a path is of the protocol v2, and its errors in that protocol's shape."""
    return path == V2 or path.startswith(f"{V2}/")


def is_infer(path: str) -> bool:
    """Whether a POST to a path is a request for inference by the protocol v2."""
    match = V2_MODEL_PATH.fullmatch(path)
    return match is not None and match[3] == "/infer"


def model_of(path: str) -> tuple[str, str | None]:
    """Return the model's name and version in a path of the protocol v2; None where it names no version."""
    match = V2_MODEL_PATH.fullmatch(path)
    assert match is not None
    return match[1], match[2]


def is_keyed_v2(path: str) -> bool:
    """Whether a path of the protocol v2 tells of models, so that it needs a key; probes and `/v2` need none."""
    match = V2_MODEL_PATH.fullmatch(path)  # a model, too, may be named "ready"
    is_probe = match is not None and match[3] == "/ready"
    return path.startswith((f"{V2}/models/", f"{V2}/repository/")) and not is_probe
