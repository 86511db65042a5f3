"""Write docs/reference.md: every setting, error code and metric of the service, from the code that has them.

Run where the project is installed, in the environment that `make test` makes: python docs/write_reference.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from service.errors import ERRORS
from service.metrics.registry import Metrics
from service.settings import Settings

TARGET = Path(__file__).parent / "reference.md"

HEAD = """\
# Reference: settings, answers, metrics

Every setting, every error code, what of the Open Inference Protocol v2 is there, and every metric. Written by
`python docs/write_reference.py` from the code; a test holds the two together.

## Settings

Each is the environment variable and the flag of `python -m service`; the flag wins, an empty variable counts as unset.
A value outside its bounds, an unknown flag and a misspelt `PERCEIVER_` variable stop the start with a sentence and
status 2.

| variable | flag | default | what it does |
|---|---|---|---|
"""

ANSWERS = """
## Answers that are not a prediction

One shape, `{"error": {"code", "message", "request_id"}}`; compare with the code, which stays. 503 carries `Retry-After`
in seconds. None of the 4xx reaches the queue, 499 excepted.

| status | code | when |
|---|---|---|
"""

V2 = """
## Open Inference Protocol v2

Over HTTP, on the port of `/predict` but for what the table says; errors are `{"error": "sentence"}`.
[clients.md](clients.md) has an example of each client.

| endpoint | |
|---|---|
| `GET /v2`, `/v2/health/live`, `/v2/health/ready` | yes, without a key |
| `GET /v2/models/NAME[/versions/VERSION]`, and `/ready`, `/config` below it | yes; NAME is the model's own, and of \
its versions the live one alone is there |
| `POST /v2/models/NAME[/versions/VERSION]/infer` | yes |
| `GET /v2/models/NAME[/versions/VERSION]/stats`, `GET /v2/models/stats` | yes; the worker's since its start. On the \
management port alone where there is one, as `/metrics` is |
| `POST /v2/repository/index` | yes; the body, `ready` in it too, is not read. On the management port alone where \
there is one, as `/models` is |
| `/v2/repository/models/NAME/load`, `/unload` | no: 404. The highest version in the model folder serves |
| `/v2/logging`, `/v2/trace/setting`, `/v2/systemsharedmemory`, `/v2/cudasharedmemory`, `/generate` | no: 404 |
| gRPC | no |

Where keys are set, all but the first row and `/ready` want one.

| extension | |
|---|---|
| binary tensor data: `Inference-Header-Content-Length`, `binary_data_size`, `binary_data`, `binary_data_output` | \
yes, both ways |
| a bare binary body, without JSON | no: 400 |
| classification | yes: `value:index:label`, of `logits` or `probabilities`, up to `PERCEIVER_MAX_TOP_K` |
| parameters | `timeout`, in microseconds, is the deadline; `sequence_id`, `priority` and unknown ones are ignored |
| compressed requests (`Content-Encoding: gzip`, `deflate`) | no: 415. Responses are never compressed |

| tensor | datatype, shape | |
|---|---|---|
| input `images` | UINT8 `[N, H, W, 3]` | RGB pixels of the model's size; flat or nested in JSON |
| input `image_bytes` | BYTES `[N]` | whole files, as `/predict` takes them; base64 in JSON |
| output `logits` | FP32 `[N, C]` | the default |
| output `probabilities` | FP32 `[N, C]` | their softmax |
| output `features` | FP32 `[N, D]` | where the model has them ([explanations](explanations.md)) |
| output `unfamiliarity` | FP32 `[N, 1]` | where the model has it ([explanations](explanations.md)) |

A request has one input. More inputs, another name, datatype, shape or length, and an output that the model has not, are
answered with 400.
"""

METRICS = """
## Metrics

`GET /metrics`, Prometheus text, or OpenMetrics (with request ids as exemplars on `perceiver_request_seconds`) where the
client accepts it. Times are in seconds. A histogram has `_bucket`, `_sum` and `_count` behind its name. Those of the
process and of Python's collector are `prometheus_client`'s own; those that begin with `perceiver_gpu_` are there on a
host with an NVIDIA driver (NVML).

| metric | type | labels | what it is |
|---|---|---|---|
"""


def settings() -> Iterator[str]:
    """A row for each setting."""
    for name, field in Settings.model_fields.items():
        default = show(field.default)
        text = (field.description or "").replace("|", "\\|")
        flag = f"--{name.replace('_', '-')}"
        flags = f"`{flag}`, `--no-{flag[2:]}`" if field.annotation is bool else f"`{flag}`"
        if get_origin(field.annotation) is Literal:
            text += f" One of {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}."
        yield f"| `PERCEIVER_{name.upper()}` | {flags} | {default} | {text} |"


def show(value: object) -> str:
    """A default as a user would write it."""
    if value is None or value == ():
        return "unset"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


def answers() -> Iterator[str]:
    """A row for each error, by status and code."""
    for kind in sorted(ERRORS, key=lambda kind: (kind.status, kind.code)):
        yield f"| {kind.status} | `{kind.code}` | {kind.when} |"


def metrics() -> Iterator[str]:
    """A row for each metric of our own, those of a GPU included."""
    for collector in vars(Metrics()).values():
        if not hasattr(collector, "describe"):
            continue
        for family in collector.describe():
            labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", collector_labels(collector)))
            if family.name.startswith("perceiver_"):
                name = f"{family.name}_total" if family.type == "counter" else family.name
                yield f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


def collector_labels(collector: object) -> tuple[str, ...]:
    """The labels of a metric of our own; those of families that are made at each scrape stand in the family."""
    return getattr(collector, "_labelnames", ())


def page() -> str:
    """The whole page."""
    parts = (HEAD, settings(), ANSWERS, answers(), V2, METRICS, metrics())
    return "".join(part if isinstance(part, str) else "".join(f"{row}\n" for row in part) for part in parts)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
