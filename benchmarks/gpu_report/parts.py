"""The parts of the report. Each adds its rows to the report as they come; one that raises gets a row that says why."""

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT, BenchmarkError, ModelPlace, find_model, usable_cores
from benchmarks.engine import measure_in_turn, rows_of
from benchmarks.gpu_report.forms import (
    ENGINE_FORMS,
    PLAIN,
    TorchEngine,
    add_float16,
    open_form,
    random_images,
    trained_form,
)
from benchmarks.gpu_report.page import Report
from service.engine.metadata import MODEL_FILES, Precision
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import Provider, read_metadata, resolve_provider
from service.repository.folder import GOLDEN_FILE, load_golden
from service.repository.golden_check import check_golden

if TYPE_CHECKING:
    from benchmarks.processes import Load
    from benchmarks.server import Server

PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
SHIPPED = "shipped"
MAX_CELL_S = 1.0  # of one form at one batch size
MEASURING_SHARE = 0.4  # of a part's time; the rest opens files, captures and compiles
MAX_HTTP_S, WARMUP_S = 8.0, 1.0  # of an HTTP load, and before it
IMAGES = 256
SWAP_POLL_S = 0.2
AFTER_SWAP_S = 0.5
DEFAULT_RATE = 20.0
OPEN_CONNECTIONS, MAX_PROCESSES = 256, 4


@dataclass
class Run:
    """What all parts share.

    Attributes:
        report: takes the rows.
        device: "cpu" or "cuda".
        model: the shipped model's folder.
        batches: sizes, ascending.
        folder: temporary; holds a copy of each model.
        http_s: seconds of an HTTP load at most.
        deadline: moment of the monotonic clock at which the part that runs is stopped.
        places: of the models that are ready, by name.
    """

    report: Report
    device: Provider
    model: Path
    batches: Sequence[int]
    folder: Path
    http_s: float = MAX_HTTP_S
    deadline: float = 0.0
    places: dict[str, ModelPlace] = field(default_factory=dict)

    def remaining_s(self) -> float:
        """Seconds that the part still has."""
        return max(0.0, self.deadline - time.monotonic())

    def provider(self) -> Provider:
        """Return the provider that was asked for.

        Raises:
            EngineError: it can't be used here, and why.
        """
        return resolve_provider(self.device)

    def place(self, name: str) -> ModelPlace:
        """Return where a model is.

        Raises:
            BenchmarkError: the part that prepares it has failed.
        """
        if name not in self.places:
            raise BenchmarkError(f"there is no model folder of {name}; the row of the part 'prepare' says why")
        return self.places[name]


@dataclass(frozen=True)
class Part:
    """One part: what it does, of which model, and its share of the time, in parts of the sum."""

    name: str
    model: str
    weight: float
    measure: Callable[[Run, str], None]


def all_parts(presets: Sequence[str]) -> list[Part]:
    """List the parts in the order in which they run: what is asked most comes first."""
    models = (SHIPPED, *presets)
    return [
        Part("prepare", SHIPPED, 6, prepare),
        Part("golden", SHIPPED, 4, golden),
        Part("tests", "", 14, gpu_tests),
        *(Part("prepare", name, 4, prepare) for name in presets),
        *(Part("engine", name, 12, engine) for name in models),
        *(Part("torch", name, 6, torch_forms) for name in models),
        *(Part("http", name, 4, http) for name in models),
        Part("swap", SHIPPED, 6, swap),
    ]


def prepare(run: Run, name: str) -> None:
    """Copy the shipped model, or export a preset with random weights, and make the float16 file."""
    if name == SHIPPED:
        found = find_model(run.model)
        folder = run.folder / name
        place = ModelPlace(folder, found.version, folder / str(found.version))
        shutil.copytree(found.path, place.path)
    else:
        from export.build import Options, export
        from export.source import random_source

        path = export(random_source(name), Options(out=run.folder / name, golden=1, max_batch=1))
        place = ModelPlace(path.parent, int(path.name), path)
    run.places[name] = place
    add_float16(place, run.provider())


def golden(run: Run, name: str) -> None:
    """Replay the golden images of the shipped model in each precision."""
    place = run.place(name)
    for precision in PRECISIONS:
        if note := attempt(run, "golden", name, precision, "", partial(_replay, run, place, precision)):
            run.report.add("golden", model=name, precision=precision, note=note)


def _replay(run: Run, place: ModelPlace, precision: Precision) -> str:
    with closing(OnnxEngine(place.path / MODEL_FILES[precision], provider=run.provider(), max_batch_size=8)) as engine:
        engine.warm_up()
        found = check_golden(engine, load_golden(place.path / GOLDEN_FILE))
        return (
            f"passed: largest difference of a logit {found.max_abs_difference:.2g}, allowed are "
            f"{engine.metadata.golden_tolerance:.2g}; {found.labels_differ} of {found.n} labels differ"
        )


def gpu_tests(run: Run, name: str) -> None:
    """Run the tests that are marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        raise BenchmarkError("pytest is not installed")
    files = sorted(
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            run.report.add("tests", note=line)
    run.report.add("tests", note=f"pytest -m gpu: {lines[-1].strip('= ') if lines else f'status {done.returncode}'}")


def engine(run: Run, name: str) -> None:
    """Measure the engine's forms in turn, by batch size and precision."""
    place, provider = run.place(name), run.provider()
    forms = [PLAIN] if provider == "cpu" else list(ENGINE_FORMS)
    if provider == "cpu":
        run.report.add("engine", model=name, note=f"{' and '.join(ENGINE_FORMS[1:])} want a GPU")
    cells = len(forms) * len(PRECISIONS) * len(run.batches)
    seconds = min(MAX_CELL_S, MEASURING_SHARE * run.remaining_s() / cells)
    end = run.deadline
    for number, precision in enumerate(PRECISIONS):
        run.deadline = end - run.remaining_s() * (len(PRECISIONS) - number - 1) / (len(PRECISIONS) - number)
        with ExitStack() as stack:
            engines: dict[str, Any] = {}
            for form in forms:
                make = partial(open_form, form, place.path / MODEL_FILES[precision], provider, run.batches)
                opened = attempt(run, "engine", name, precision, form, make)
                if opened is not None:
                    engines[form] = stack.enter_context(closing(opened))
            by_batch(run, "engine", name, precision, engines, seconds)
    run.deadline = end


def torch_forms(run: Run, name: str) -> None:
    """Measure torch, eager at each batch size, and compiled at the engine's best."""
    model, size = trained_form(run.place(name), None if name == SHIPPED else name)
    import torch

    if run.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"torch {torch.__version__} sees no CUDA device")
    seconds = min(MAX_CELL_S, MEASURING_SHARE * run.remaining_s() / (len(PRECISIONS) * (len(run.batches) + 1)))
    end = run.deadline
    for eager in (True, False):
        run.deadline = end - run.remaining_s() / 2 if eager else end
        for precision in PRECISIONS:
            half = precision == "float16"
            if eager:
                form, batches = "torch eager", run.batches
                module = model
            else:
                best = run.report.best(name, precision)
                form, batches = "torch compiled", [int(str(best["batch"])) if best else max(run.batches)]
                mode = "reduce-overhead" if run.device == "cuda" else "default"  # the first has CUDA graphs
                module = torch.compile(model, mode=mode, dynamic=False)
            opened = TorchEngine(module, size, run.device, half=half, max_batch_size=max(run.batches))
            if not eager:
                compiling = partial(opened.run, random_images(batches[0], size))
                if attempt(run, "torch", name, precision, form, compiling) is None:
                    continue
            by_batch(run, "torch", name, precision, {form: opened}, seconds, batches)


def by_batch(
    run: Run,
    part: str,
    name: str,
    precision: str,
    engines: dict[str, Any],
    seconds: float,
    batches: Sequence[int] | None = None,
) -> None:
    """Measure in turn, from the smallest batch size up, until memory or time ends."""
    for batch in batches or run.batches:
        for form in [form for form, engine in engines.items() if engine.max_batch_size < batch]:
            run.report.add(part, model=name, precision=precision, form=form, batch=batch, note="not enough memory")
            del engines[form]
        if not engines:
            return
        try:
            ((_, cells),) = measure_in_turn(list(engines.values()), [batch], seconds=seconds, rounds=2)
        except Exception as error:
            run.report.add(part, model=name, precision=precision, batch=batch, note=reason(error))
            return
        slowest = 0.0
        for row in rows_of(batch, cells, list(engines), [None] * len(cells), peak=1.0):
            values = {column: row[column] for column in ("runs", "ms_median", "ms_best", "images_per_s")}
            run.report.add(part, model=name, precision=precision, form=row["model"], batch=batch, **values)
            slowest += float(str(row["ms_median"])) / 1e3
        if 8 * slowest > run.remaining_s():  # two rounds of two runs, of twice the size
            if batch != max(batches or run.batches):
                run.report.add(part, model=name, precision=precision, note=f"no time for batches above {batch}")
            return


def http(run: Run, name: str) -> None:
    """Load the service in a closed loop of twice the engine's best batch size."""
    place = run.place(name)
    for precision in PRECISIONS:
        batch = best_batch(run, name, precision)
        with start_server(run, place, precision, batch) as server:
            connections = max(8, 2 * batch)
            load = send(run, place, server, connections)
            add_load(run, "http", name, precision, batch, load, "closed loop", connections=connections)


def swap(run: Run, name: str) -> None:
    """Publish the same model as a new version under load: half of what HTTP answered, arrivals at random."""
    place, precision = run.place(name), PRECISIONS[0]
    batch, new = best_batch(run, name, precision), place.version + 1
    rates = [row["images_per_s"] for row in run.report.rows if (row["part"], row["model"]) == ("http", name)]
    rate = min((float(str(one)) for one in rates if one), default=2 * DEFAULT_RATE) / 2
    hidden, published = place.folder / f".{new}", []
    shutil.copytree(place.path, hidden)

    def publish() -> None:
        hidden.rename(place.folder / str(new))
        published.append(time.monotonic())

    with start_server(run, place, precision, batch, model_version="", model_poll_s=str(SWAP_POLL_S)) as server:
        load = send(run, place, server, OPEN_CONNECTIONS, rate=rate, publish=publish)
        while first_answer(load, new) is None and run.remaining_s() > 2 * (WARMUP_S + run.http_s):
            more = send(run, place, server, OPEN_CONNECTIONS, rate=rate, publish=lambda: None)
            load.records.extend(more.records)
            load = replace(load, end=more.end)
    how = f"open loop, {rate:.0f} requests/s"
    add_load(run, "swap", name, precision, batch, replace(load, end=published[0]), f"{how}, before the swap")
    taken = first_answer(load, new)
    if taken is None:
        raise BenchmarkError(f"version {new} answered nothing in {load.end - published[0]:.1f} s after its publication")
    note = f"{how}, from the publication of version {new} to {AFTER_SWAP_S:g} s after its first answer, which came "
    note += f"{taken - published[0]:.2f} s after it"
    during = replace(load, begin=published[0], end=taken + AFTER_SWAP_S)
    add_load(run, "swap", name, precision, batch, during, note)


def best_batch(run: Run, name: str, precision: str) -> int:
    """Return the engine's batch size with the most images a second; the smallest where it has none."""
    best = run.report.best(name, precision)
    return int(str(best["batch"])) if best else min(run.batches)


def start_server(run: Run, place: ModelPlace, precision: str, batch: int, **settings: str) -> "Server":
    """Return the service, not yet entered.

    Raises:
        BenchmarkError: fastapi is not installed.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise BenchmarkError("fastapi is not installed, so there is no service to load")
    from benchmarks.server import Server

    own = {"provider": run.provider(), "precision": precision, "max_batch_size": str(batch)}
    return Server(place, own | settings, ready_timeout_s=max(10.0, run.remaining_s()))


def send(
    run: Run,
    place: ModelPlace,
    server: "Server",
    connections: int,
    *,
    rate: float | None = None,
    publish: Callable[[], None] | None = None,
) -> "Load":
    """Send JPEGs of the model's size, in an open loop at `rate` or a closed one; publish after a quarter."""
    from benchmarks.generator import Plan, arrival_times
    from benchmarks.payloads import build_requests, generate_images
    from benchmarks.processes import run_load
    from benchmarks.server import HOST

    side = read_metadata(place.path / MODEL_FILES["float32"]).input_size[0]
    requests = build_requests(generate_images(IMAGES, side, "jpeg"), "raw", host=HOST)
    seconds = WARMUP_S + min(run.http_s, max(1.0, MEASURING_SHARE * run.remaining_s()))
    plan = Plan(HOST, server.port, requests, connections, seconds, keep_bodies=publish is not None)
    if rate is not None:
        plan = replace(plan, arrivals=arrival_times(rate, seconds, "poisson"))
    processes = max(1, min(MAX_PROCESSES, usable_cores() // 2))
    if publish is None:
        return run_load(plan, warmup_s=WARMUP_S, processes=processes)
    timer = threading.Timer((seconds - WARMUP_S) / 4, publish)

    def begin() -> None:
        """Start the timer with the window: there, and at its end, the load reads the server's CPU time."""
        if timer.ident is None:
            timer.start()

    try:
        return run_load(plan, warmup_s=WARMUP_S, processes=processes, server_cpu=begin)
    finally:
        timer.cancel()


def add_load(
    run: Run, part: str, name: str, precision: str, batch: int, load: "Load", note: str, connections: int | None = None
) -> None:
    """Add the row of a load's window."""
    from benchmarks.summary import summarize

    summary = summarize(load)
    run.report.add(
        part,
        model=name,
        precision=precision,
        batch=batch,
        connections=connections,
        images_per_s=summary.images_per_second if connections else None,  # an open loop has the rate that it is given
        p50_ms=summary.latency_ms.get("p50"),
        p99_ms=summary.latency_ms.get("p99"),
        errors="; ".join(f"{code}: {n}" for code, n in summary.errors.items()) or "none",
        note=note,
    )


def first_answer(load: "Load", version: int) -> float | None:
    """Return when the first answer of a version was complete, in seconds of the monotonic clock; None if none was."""
    records = load.records
    ends = [
        ended
        for ended, status, body in zip(records.ended, records.status, records.body, strict=True)
        if status == 200 and json.loads(body)["version"] == version
    ]
    return min(ends, default=None)


def reason(error: BaseException) -> str:
    """Say in one line why something failed; where the first line announces a log, with the log's last line."""
    lines = str(error).strip().splitlines() or [""]
    first = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    text = f"{type(error).__name__}: {first}" if not isinstance(error, BenchmarkError) else first
    return text if len(text) <= 300 else f"{text[:297]}..."


def attempt(run: Run, part: str, name: str, precision: str, form: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns; None, and a row that says why, where it raises."""
    try:
        return make()
    except Exception as error:
        run.report.add(part, model=name, precision=precision, form=form or None, note=reason(error))
        return None
