"""The same job on other serving frameworks, in turn in one run: `python -m benchmarks.rivals`.

Small JPEGs, one a request, to a tiny model, so that what is measured is what serving costs: HTTP, decoding, batching.
Or to a model of one's own (`--model`): then it is the job as it is. Every answer's label is checked; CPU time and
memory are those of all processes of a server.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.common import (
    ROOT,
    BenchmarkError,
    ModelPlace,
    describe_run,
    find_model,
    print_run,
    report,
    run_command,
)
from benchmarks.generator import Plan
from benchmarks.payloads import ImageFile, build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.request_path import IMAGES, SETTINGS
from benchmarks.rivals.environments import environment, requirements
from benchmarks.rivals.frameworks import Framework, choose
from benchmarks.rivals.labels import Expected, expect, reject_wrong_labels
from benchmarks.rivals.process_tree import tree_cpu_seconds, tree_memory_bytes
from benchmarks.rivals.servers import RivalServer
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import Summary, medians, summarize
from benchmarks.tiny_model import make_tiny_model
from service.engine.metadata import MODEL_FILE
from service.engine.session import read_metadata

OURS = "this service"
OWN_MODEL = {"provider": "cpu", "precision": "float32"}
WARMUP_S = 1.0  # longer than in request_path: BentoML learns from its first batches how long to wait


@dataclass
class Contender:
    """A server that takes part, and what was measured of it.

    Attributes:
        title: of its row.
        open: starts it.
        requests: whole requests, one for each image.
        summaries: one a round.
        memory_bytes: resident memory of the tree after each round.
    """

    title: str
    open: Callable[[], Server | RivalServer]
    requests: Sequence[bytes]
    summaries: list[Summary] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rivals: triton, mosec, litserve, bentoml")
    parser.add_argument("--model", type=Path, metavar="DIR", help="serve this model, and not a tiny one")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server, in turn")
    parser.add_argument("--processes", type=int, default=1, help="of the load generator")
    parser.add_argument(
        "--workers", nargs="+", default=["auto"], metavar="N", help="of this service, which runs with each"
    )
    parser.add_argument("--setting", action="append", default=[], metavar="NAME.SETTING=NUMBER", help="of a rival")
    parser.add_argument("--service", action="append", default=[], metavar="NAME=VALUE", help="setting of this service")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".rivals", metavar="DIR", help="where their environments are made"
    )
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args()


def enter(
    frameworks: Mapping[str, Framework],
    model: ModelPlace,
    images: Sequence[ImageFile],
    args: argparse.Namespace,
) -> list[Contender]:
    """Return our service, once with each number of workers, and the rivals that have or get an environment."""
    requests = build_requests(images, "raw", host=HOST, path="/predict?top_k=1")
    settings = settings_of_ours(args)
    contenders = [
        Contender(title_of(number), partial(Server, model, settings | {"workers": number}), requests)
        for number in args.workers
    ]
    for name, framework in frameworks.items():
        try:
            python = environment(name, args.environments)
        except BenchmarkError as error:
            print(f"{name} is left out: {error}\n", file=sys.stderr, flush=True)
            continue
        requests = build_requests(images, framework.form, host=HOST, path=framework.path, headers=framework.headers)
        contenders.append(
            Contender(framework.title, partial(RivalServer, framework, python, model, requests[0]), requests)
        )
    return contenders


def settings_of_ours(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings of our service: for a model of one's own the defaults, and the file that the rivals run."""
    return (SETTINGS if args.model is None else OWN_MODEL) | parse_settings(args.service)


def title_of(workers: str) -> str:
    """Name our service with so many workers."""
    return OURS if workers == "1" else f"{OURS}, workers={workers}"


def check(contender: Contender, port: int, expected: Expected) -> None:
    """Send every image once and hold the labels against onnxruntime's.

    Raises:
        BenchmarkError: an answer is not 200, or has another label.
    """
    load = run_load(Plan(HOST, port, contender.requests, connections=16, keep_bodies=True))
    reject_wrong_labels(load.records, expected)
    if errors := summarize(load).errors:
        body = next(body for body, status in zip(load.records.body, load.records.status, strict=True) if status != 200)
        raise BenchmarkError(f"{contender.title}: not every answer is right: {errors}, as {body[:200]!r}")


def measure(contender: Contender, args: argparse.Namespace, expected: Expected) -> None:
    """Run one round: start it, check an image each, load it, check every answer, stop it.

    Alone on the machine: some rivals poll, and would take time from the others while they wait for their turn.

    Raises:
        BenchmarkError: it can't be started, or its answers are wrong.
    """
    seconds = WARMUP_S + args.seconds
    with contender.open() as server:
        check(contender, server.port, expected)
        plan = Plan(HOST, server.port, contender.requests, args.connections, seconds=seconds, keep_bodies=True)
        cpu = partial(tree_cpu_seconds, server.pid)
        load = run_load(plan, warmup_s=WARMUP_S, processes=args.processes, server_cpu=cpu)
        if (memory := tree_memory_bytes(server.pid)) is not None:
            contender.memory_bytes.append(memory)
    reject_wrong_labels(load.records, expected)
    contender.summaries.append(summarize(load))


def measure_in_turn(contenders: list[Contender], args: argparse.Namespace, expected: Expected) -> list[Contender]:
    """Run all rounds; return those that took part in every one, and say why another did not.

    Raises:
        BenchmarkError: our own service failed.
    """
    for _ in range(args.rounds):
        for contender in contenders.copy():
            try:
                measure(contender, args, expected)
            except BenchmarkError as error:
                if contender.title.startswith(OURS):
                    raise
                print(f"{contender.title} is left out: {error}\n", file=sys.stderr, flush=True)
                contenders.remove(contender)
    return contenders


def rows_of(contenders: Sequence[Contender]) -> list[dict[str, object]]:
    """One row a server, medians over its rounds; `ours_by_it` is our median images a second by the server's."""
    rates = [median(summary.images_per_second for summary in item.summaries) for item in contenders]
    return [
        {
            "server": item.title,
            **medians(item.summaries),
            "ours_by_it": rates[0] / rate if rate else None,
            "memory_mib": median(item.memory_bytes) / 2**20 if item.memory_bytes else None,
        }
        for item, rate in zip(contenders, rates, strict=True)
    ]


def side_of(model: ModelPlace) -> int:
    """Return the side of the images that a model takes, pixels.

    Raises:
        BenchmarkError: they are not square.
    """
    height, width = read_metadata(model.path / MODEL_FILE).input_size
    if height != width:
        raise BenchmarkError(f"{model.path}: takes {height} x {width} pixels; here it must be a square")
    return height


def describe(frameworks: Mapping[str, Framework], args: argparse.Namespace, side: int) -> dict[str, str]:
    """Say how it is measured, and with which versions and settings of the rivals."""
    ours = ", ".join(f"{name}={value}" for name, value in settings_of_ours(args).items())
    method = (
        f"{args.rounds} rounds of {args.seconds:g} s in turn, medians; closed loop, {args.connections} connections; "
        f"JPEGs of {side} x {side}; {OURS}: {ours}"
    )
    about = {**describe_run(), "method": method}
    for name, framework in frameworks.items():
        pinned = [
            line for line in requirements(name).splitlines() if line.startswith((framework.package, "onnxruntime"))
        ]
        settings = [f"{setting}={value}" for setting, value in framework.settings.items()]
        about[name] = ", ".join([*pinned, *settings])
    return about


def main() -> int:
    """Start, check, measure in turn, print, write."""
    args = parse_arguments()
    frameworks = choose(args.only, args.setting, costly=args.model is not None)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder)) if args.model is None else find_model(args.model)
        side = side_of(model)
        about = describe(frameworks, args, side)
        print_run(about)
        images = generate_images(IMAGES, side, "jpeg")
        expected = expect(model.path / MODEL_FILE, images)
        contenders = measure_in_turn(enter(frameworks, model, images, args), args, expected)
    rows = rows_of(contenders)
    report(rows, about, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main)
