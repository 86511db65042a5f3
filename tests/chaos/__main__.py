"""python -m tests.chaos: break things on a real service, print what happened, end with 1 when a promise was broken.

    misuse      10,000 random requests of clients that behave badly, and then a normal one
    overload    five times as many requests as the model can answer
    costly      files that are made to cost seconds or gigabytes, beside small requests
    fuzz        100,000 mutated images through the decoder, and as many mutated bodies through each parser
    openapi     schemathesis, every check on: no 500, and no answer that the OpenAPI document does not know

Without a word: misuse, overload and costly, each with its defaults.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.chaos import openapi, slow_service
from tests.chaos.client import rampage
from tests.chaos.costly import SETTINGS, costly
from tests.chaos.fuzz import TARGETS, fuzz
from tests.chaos.overload import Target, overload
from tests.chaos.service import LIMITS, Vitals
from tests.end_to_end.process import Process, on_model, started
from tests.fakes import make_model_folder

Complaints = list[str]


def parser() -> argparse.ArgumentParser:
    """Every run and its options; the defaults are those of `make chaos`."""
    whole = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = whole.add_subparsers(dest="run", metavar="RUN")
    misuse = runs.add_parser("misuse", help="clients that behave badly")
    misuse.add_argument("--requests", type=int, default=10_000, help="misdeeds to send (default: %(default)s)")
    misuse.add_argument("--concurrency", type=int, default=64, help="connections at a time (default: %(default)s)")
    misuse.add_argument("--seed", type=int, default=0, help="the same sends the same misdeeds (default: %(default)s)")
    load = runs.add_parser("overload", help="more requests than can be answered")
    load.add_argument("--factor", type=float, default=5, help="times the unloaded maximum (default: %(default)s)")
    load.add_argument("--seconds", type=float, default=20, help="that count (default: %(default)s)")
    load.add_argument("--model", type=Path, help="model folder; default: a device whose runs take --run-ms")
    load.add_argument(
        "--run-ms", type=float, default=50, help="of that device, whatever the batch (default: %(default)s)"
    )
    load.add_argument("--max-batch-size", type=int, default=16, help="of the service (default: %(default)s)")
    load.add_argument("--max-queue-size", type=int, default=128, help="of the service (default: %(default)s)")
    dear = runs.add_parser("costly", help="files that are made to cost much")
    dear.add_argument("--seconds", type=float, default=3, help="for each file (default: %(default)s)")
    damage = runs.add_parser("fuzz", help="mutated images and bodies")
    damage.add_argument("--count", type=int, default=100_000, help="inputs of each target (default: %(default)s)")
    damage.add_argument("--seed", type=int, default=0, help="the same makes the same inputs (default: %(default)s)")
    damage.add_argument("--target", choices=sorted(TARGETS), action="append", help="default: all")
    document = runs.add_parser("openapi", help="answers against the OpenAPI document")
    document.add_argument("--seconds", type=int, default=300, help="for generated requests (default: %(default)s)")
    document.add_argument("--seed", type=int, default=0, help="the same sends the same requests (default: %(default)s)")
    return whole


@contextmanager
def served(folder: Path, *arguments: str, module: str, **variables: str) -> Iterator[tuple[Process, httpx.Client]]:
    """A service that is ready."""
    with started(folder, *arguments, module=module, **variables) as process, process.ready() as client:
        yield process, client


def compared(process: Process, client: httpx.Client, before: Vitals) -> Complaints:
    """Look at the service once more, print both, and let it end."""
    after = Vitals.of(process, client)
    print(f"before: {before}\nafter:  {after}")
    process.signal()
    status = process.exit_status()
    return before.complaints(after) + ([f"it ended with status {status}"] if status else [])


def run_misuse(options: argparse.Namespace, folder: Path) -> Complaints:
    """Send misdeeds, as many at once as are told."""
    make_model_folder(folder / "m")
    with served(folder, *on_model(folder / "m", *LIMITS), module="service") as (process, client):
        address = (client.base_url.host, client.base_url.port or 0)
        asyncio.run(rampage(*address, requests=500, concurrency=options.concurrency, seed=-1))  # to its full size
        before = Vitals.of(process, client)
        begun = time.perf_counter()
        report = asyncio.run(
            rampage(*address, requests=options.requests, concurrency=options.concurrency, seed=options.seed)
        )
        print(f"{report}\n{options.requests} requests in {time.perf_counter() - begun:.1f} s")
        return report.surprises + compared(process, client, before)


def run_overload(options: argparse.Namespace, folder: Path) -> Complaints:
    """Send more than can be answered."""
    model, module = options.model, "service"
    if model is None:
        model, module = folder / "m", slow_service.MODULE
        make_model_folder(model)
    settings = (
        f"--max-batch-size={options.max_batch_size}",
        f"--max-queue-size={options.max_queue_size}",
    )
    with served(folder, *on_model(model, *settings), module=module, **{slow_service.VARIABLE: str(options.run_ms)}) as (
        process,
        client,
    ):
        target = Target(client.base_url.host, client.base_url.port or 0, options.max_batch_size, options.max_queue_size)
        overload(target, factor=options.factor, seconds=1, calibration_s=1)  # to its full size
        before = Vitals.of(process, client)
        seen = overload(target, factor=options.factor, seconds=options.seconds, calibration_s=5)
        print(seen)
        return seen.complaints() + compared(process, client, before)


def run_costly(options: argparse.Namespace, folder: Path) -> Complaints:
    """Send what is made to cost much."""
    make_model_folder(folder / "m")
    with served(folder, *on_model(folder / "m", *SETTINGS), module="service") as (process, client):
        address = (client.base_url.host, client.base_url.port or 0)
        complaints = costly(address, process.popen.pid, options.seconds)
        status = client.get("/health/ready").status_code
        return complaints + ([f"readiness is {status}"] if status != 200 else [])


def run_fuzz(options: argparse.Namespace, folder: Path) -> Complaints:
    """Try mutated inputs."""
    complaints = []
    for target in options.target or sorted(TARGETS):
        begun = time.perf_counter()
        findings = fuzz(target, options.count, options.seed)
        print(f"{options.count} {target} in {time.perf_counter() - begun:.1f} s\n{findings}")
        complaints += findings.surprises
    return complaints


def run_openapi(options: argparse.Namespace, folder: Path) -> Complaints:
    """Compare answers with the document."""
    make_model_folder(folder / "m")
    with served(folder, *on_model(folder / "m", *openapi.ARGUMENTS), module="service") as (process, client):
        client.headers["x-api-key"] = openapi.KEY
        before = Vitals.of(process, client)
        url = str(client.base_url).rstrip("/")
        done = openapi.check_document(url, folder, f"--max-time={options.seconds}", f"--seed={options.seed}")
        print(done.stdout)
        failed = [f"schemathesis ended with status {done.returncode}"] if done.returncode else []
        return failed + compared(process, client, before)


RUNS: dict[str, Callable[[argparse.Namespace, Path], Complaints]] = {
    "misuse": run_misuse,
    "overload": run_overload,
    "costly": run_costly,
    "fuzz": run_fuzz,
    "openapi": run_openapi,
}


def main() -> int:
    """Run what is asked for; return 1 if any promise was broken."""
    options = parser().parse_args()
    complaints = []
    for name in [options.run] if options.run else ["misuse", "overload", "costly"]:
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = RUNS[name](options if options.run else parser().parse_args([name]), Path(folder))
        print("\n".join(f"BROKEN: {complaint}" for complaint in found) or "every promise was kept", flush=True)
        complaints += found
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
