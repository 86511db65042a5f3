"""Which rivals there are: how each is started, what is sent to it, and the settings that were fastest for it.

`benchmarks/README.md` says which settings were tried. `--setting NAME.SETTING=VALUE` tries others.
"""

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
COSTLY = {"workers": 2, "batch": 8}  # two cores, and what one run of the shipped model does fastest
PLAIN = {"threads": 1, "batch": job.MAX_BATCH_SIZE}  # of a run on the CPU; images of one at most


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
        settings: its own, by name; the server module reads them with `job.setting`.
        costly: those that are others for a model of which a run takes milliseconds.
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
    costly: Mapping[str, int] = field(default_factory=dict)


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
        PLAIN | {"workers": 2, "wait_us": 0, "http_threads": 8, "metrics": 1},
        _triton,
        _triton_variables,
        _triton_packages,
        path=f"/v2/models/{TRITON_MODEL}/infer",
        headers={"Inference-Header-Content-Length": "0"},  # Triton's raw binary request: the body is the one tensor
        costly=COSTLY,
    ),
    "mosec": Framework(
        "Mosec", "mosec", PLAIN | {"workers": 1, "wait_ms": 1}, _mosec, path="/inference", costly=COSTLY
    ),
    "litserve": Framework(
        "LitServe", "litserve", PLAIN | {"workers": 1, "wait_ms": 0, "api_servers": 2}, _litserve, costly=COSTLY
    ),
    "bentoml": Framework(
        "BentoML",
        "bentoml",
        PLAIN | {"workers": 2, "max_latency_ms": 1000},
        _bentoml,
        _bentoml_variables,
        form="json",
        path="/classify",
        costly=COSTLY,
    ),
}


def choose(names: Sequence[str] | None, settings: Sequence[str], *, costly: bool = False) -> dict[str, Framework]:
    """Return the frameworks by name, all of them without names, with other settings where "NAME.SETTING=VALUE" asks.

    Args:
        names: of some.
        settings: texts of this form.
        costly: whether the model is, for which they have settings of their own.

    Raises:
        BenchmarkError: a framework, or a setting of it, is unknown; a value is no whole number.
    """
    for name in names or ():
        if name not in FRAMEWORKS:
            raise BenchmarkError(f"--only {name}: must be one of {', '.join(FRAMEWORKS)}")
    chosen = {name: FRAMEWORKS[name] for name in names or FRAMEWORKS}
    if costly:
        chosen = {name: replace(item, settings={**item.settings, **item.costly}) for name, item in chosen.items()}
    for text in settings:
        key, _, value = text.partition("=")
        name, _, setting = key.partition(".")
        if name not in FRAMEWORKS or setting not in FRAMEWORKS[name].settings or not value.isdecimal():
            known = ", ".join(f"{name}.{setting}" for name in FRAMEWORKS for setting in FRAMEWORKS[name].settings)
            raise BenchmarkError(f"--setting {text}: must have the form NAME.SETTING=NUMBER, with one of {known}")
        if name in chosen:
            chosen[name] = replace(chosen[name], settings={**chosen[name].settings, setting: int(value)})
    return chosen
