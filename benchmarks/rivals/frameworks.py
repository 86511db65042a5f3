"""Which rivals there are: how each is started, what is sent to it, and the settings that are tried on it."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.common import ROOT, BenchmarkError
from benchmarks.payloads import Form
from benchmarks.rivals import job
from benchmarks.server import HOST, free_port

TRITON_MODEL = "classify"
SHARED = ("workers", "threads", "batch")  # processes, threads of a run, images of a run at most: settings of each rival


@dataclass(frozen=True)
class Place:
    """Where one rival runs.

    Attributes:
        python: interpreter of its environment.
        folder: an empty folder for what it writes, its own.
        port: TCP port.
        settings: of the framework.
    """

    python: Path
    folder: Path
    port: int
    settings: Mapping[str, int]


@dataclass(frozen=True)
class Framework:
    """A serving framework.

    Attributes:
        title: its name.
        package: on PyPI; its version is in benchmarks/rivals/NAME.txt.
        settings: its own, by name; the server module reads them, and those that all share, with `job.setting`.
        command: what starts it.
        variables: environment variables that it needs besides those of the job.
        directory: where it runs.
        form, path, headers: of a request.
    """

    title: str
    package: str
    settings: Mapping[str, int]
    command: Callable[[Place], Sequence[str | Path]]
    variables: Callable[[Place], Mapping[str, str]] = lambda place: {}
    directory: Callable[[Place], Path] = lambda place: ROOT
    form: Form = "raw"
    path: str = "/predict"
    headers: Mapping[str, str] = field(default_factory=dict)


def _mosec(place: Place) -> Sequence[str | Path]:
    options = ("--address", HOST, "--port", str(place.port), "--log-level", "warning")
    return (place.python, "-m", "benchmarks.rivals.mosec_server", *options)


def _litserve(place: Place) -> Sequence[str | Path]:
    return (place.python, "-m", "benchmarks.rivals.litserve_server")


def _bentoml(place: Place) -> Sequence[str | Path]:
    service = "benchmarks.rivals.bentoml_server:Classify"
    return (place.python, "-m", "bentoml", "serve", service, "--host", HOST, "--port", str(place.port))


def _bentoml_variables(place: Place) -> Mapping[str, str]:
    return {"BENTOML_HOME": str(place.folder), "BENTOML_DO_NOT_TRACK": "true"}


def _triton(place: Place) -> Sequence[str | Path]:
    """Lay out the model repository and the Python backend as tritonserver wants them."""
    program = _triton_folder(place) / "bin" / "tritonserver"
    backends, models = place.folder / "backends", place.folder / "models"
    # The backend's process must be of the Python version that holds the packages, and is looked for beside the backend.
    shutil.copytree(_triton_folder(place) / "backends", backends)
    version = sysconfig.get_python_version()
    stub = _triton_folder(place) / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (models / TRITON_MODEL / "1").mkdir(parents=True)
    (models / TRITON_MODEL / "1" / "model.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom benchmarks.rivals.triton_model import TritonPythonModel\n",
        encoding="utf-8",
    )
    (models / TRITON_MODEL / "config.pbtxt").write_text(triton_config(place.settings), encoding="utf-8")
    return (
        *(program, f"--model-repository={models}", f"--backend-directory={backends}"),
        *(f"--http-address={HOST}", f"--http-port={place.port}", "--allow-grpc=false"),
        *(f"--http-thread-count={place.settings['http_threads']}", "--log-info=false"),
        f"--allow-metrics={'true' if place.settings['metrics'] else 'false'}",
        *(f"--metrics-port={free_port()}", "--disable-auto-complete-config"),
    )


def _triton_variables(place: Place) -> Mapping[str, str]:
    # The backend's process embeds Python: it needs this interpreter's library. Its program is a copy, and does not find
    # the wheel's libraries by their relative path any more.
    libraries = (_triton_packages(place) / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR") or "")
    return {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}


def _triton_packages(place: Place) -> Path:
    """Return the environment's site-packages. Where the server runs: its Python ignores PYTHONPATH, and looks here."""
    return _triton_folder(place).parent.parent


def _triton_folder(place: Place) -> Path:
    found = list(place.python.parent.parent.glob("lib/python*/site-packages/pytriton/tritonserver"))
    if not found:
        raise BenchmarkError(
            "triton: nvidia-pytriton holds no tritonserver for this platform; it has one for Linux x86-64"
        )
    return found[0]


def triton_config(settings: Mapping[str, int]) -> str:
    """Write the model's config.pbtxt."""
    return f"""name: "{TRITON_MODEL}"
backend: "python"
max_batch_size: {settings["batch"]}
input {{ name: "IMAGE" data_type: TYPE_STRING dims: [1] }}
output {{ name: "ANSWER" data_type: TYPE_STRING dims: [1] }}
instance_group {{ count: {settings["workers"]} kind: KIND_CPU }}
dynamic_batching {{ max_queue_delay_microseconds: {settings["wait_us"]} }}
"""


FRAMEWORKS: dict[str, Framework] = {
    "triton": Framework(
        "Triton",
        "nvidia-pytriton",
        {"wait_us": 0, "http_threads": 8, "metrics": 1},
        _triton,
        _triton_variables,
        _triton_packages,
        path=f"/v2/models/{TRITON_MODEL}/infer",
        headers={"Inference-Header-Content-Length": "0"},  # Triton's raw binary request: the body is the one tensor
    ),
    "mosec": Framework("Mosec", "mosec", {"wait_ms": 1}, _mosec, path="/inference"),
    "litserve": Framework("LitServe", "litserve", {"wait_ms": 0, "api_servers": 2}, _litserve),
    "bentoml": Framework(
        "BentoML",
        "bentoml",
        {"max_latency_ms": 1000},
        _bentoml,
        _bentoml_variables,
        form="json",
        path="/classify",
    ),
}


def candidates(cores: int, connections: int) -> list[dict[str, int]]:
    """Return what is tried of the settings that all rivals share.

    A process for each core, with large batches and with such as a CPU runs fastest; one process whose runs take all
    cores; one process that leaves the other cores to HTTP. No batch waits for more images than there are connections.
    """
    large, small = min(job.MAX_BATCH_SIZE, connections), min(8, connections)
    shapes = [(cores, 1, large), (cores, 1, small), (1, cores, large), (1, 1, large)]
    return [dict(zip(SHARED, shape, strict=True)) for shape in dict.fromkeys(shapes)]


def choose(
    names: Sequence[str] | None, settings: Sequence[str], cores: int, connections: int
) -> dict[str, list[Framework]]:
    """Return each framework by name, once for each candidate of its settings; all of them without names.

    Args:
        names: of some.
        settings: "NAME.SETTING=VALUE", which holds in every candidate.
        cores: that the server may use.
        connections: that load it.

    Raises:
        BenchmarkError: a framework, or a setting of it, is unknown; a value is no whole number.
    """
    for name in names or ():
        if name not in FRAMEWORKS:
            raise BenchmarkError(f"--only {name}: must be one of {', '.join(FRAMEWORKS)}")
    fixed: dict[str, dict[str, int]] = {name: {} for name in FRAMEWORKS}
    known = [f"{name}.{setting}" for name, item in FRAMEWORKS.items() for setting in (*SHARED, *item.settings)]
    for text in settings:
        key, _, value = text.partition("=")
        if key not in known or not value.isdecimal():
            raise BenchmarkError(
                f"--setting {text}: must have the form NAME.SETTING=NUMBER, with one of {', '.join(known)}"
            )
        name, _, setting = key.partition(".")
        fixed[name][setting] = int(value)
    chosen: dict[str, list[Framework]] = {}
    for name in names or FRAMEWORKS:
        framework = FRAMEWORKS[name]
        tried = [{**shape, **framework.settings, **fixed[name]} for shape in candidates(cores, connections)]
        distinct = {tuple(settings.items()): settings for settings in tried}
        chosen[name] = [replace(framework, settings=settings) for settings in distinct.values()]
    return chosen
