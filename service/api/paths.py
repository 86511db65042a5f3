"""The paths of the HTTP API."""

from typing import Final

PREDICT: Final = "/predict"
PATHS: Final = frozenset(
    {PREDICT, "/health", "/health/live", "/health/ready", "/metrics", "/models", "/models/reload"}
    | {"/docs", "/openapi.json"}
)
# With a management port, clients do not see these, and operators see nothing else.
MANAGEMENT: Final = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/models", "/models/reload"})


def known_path(path: str) -> str:
    """Return the path, or "other": what clients send must not become ever new label values."""
    return path if path in PATHS else "other"
