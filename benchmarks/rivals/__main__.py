"""The same job on other serving frameworks, in turn in one run: `python -m benchmarks.rivals`.

Small JPEGs, one a request, to a tiny model, so that what is measured is what serving costs: HTTP, decoding, batching.
Or to a model of one's own (`--model`): then it is the job as it is. A short search finds each server's best settings
for each number of connections; rounds in turn, in another order each, compare these. CPU time and memory are those of
all processes of a server.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from benchmarks.rivals.frameworks import FRAMEWORKS, Framework, choose
from benchmarks.rivals.labels import Expected, expect, reject_wrong_labels
from benchmarks.rivals.process_tree import tree_cpu_seconds, tree_memory_bytes
from benchmarks.rivals.servers import RivalServer
from benchmarks.rivals.wrk import find_wrk, run_wrk, wrk_version
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import Summary, medians, over_rounds, summarize
from benchmarks.tiny_model import make_tiny_model
from service.engine.cpus import usable_cores
from service.engine.metadata import MODEL_FILE
from service.engine.session import read_metadata

OURS = "this service"
OWN_MODEL = {"provider": "cpu", "precision": "float32"}
WORKERS = ("auto", "1")  # of our service, candidates
WARMUP_S = 1.0  # longer than in request_path: BentoML learns from its first batches how long to wait


@dataclass
class Candidate:
    """Settings that a server may run with.

    Attributes:
        settings: by name, for people.
        open: starts the server with them.
        found: images a second in the search; 0 where an answer was an error.
    """

    settings: str
    open: Callable[[], Server | RivalServer]
    found: float = 0.0


@dataclass
class Contender:
    """A server that takes part, and what was measured of it.

    Attributes:
        title: of its row.
        candidates: its settings; what could not be started, or answered wrongly, is gone after the search.
        requests: whole requests, one for each image.
        summaries: one a round.
        memory_bytes: resident memory of the tree after each round.
    """

    title: str
    candidates: list[Candidate]
    requests: Sequence[bytes]
    summaries: list[Summary] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        """The settings that answered most in the search."""
        return max(self.candidates, key=lambda candidate: candidate.found)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rivals: triton, mosec, litserve, bentoml")
    parser.add_argument("--model", type=Path, metavar="DIR", help="serve this model, and not a tiny one")
    parser.add_argument("--generator", choices=("python", "wrk"), default="python", help="of the load")
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 1], help="one table row each a server")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server, in turn")
    parser.add_argument("--search-seconds", type=float, default=2.0, help="of one measurement in the search")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME.SETTING=NUMBER", help="of a rival")
    parser.add_argument("--service", action="append", default=[], metavar="NAME=VALUE", help="setting of this service")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".rivals", metavar="DIR", help="where their environments are made"
    )
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args(arguments)


def enter(
    rivals: Mapping[str, Sequence[Framework]], model: ModelPlace, images: Sequence[ImageFile], args: argparse.Namespace
) -> list[Contender]:
    """Return our service, and the rivals that have or get an environment."""
    ours = [
        Candidate(describe_settings(settings), partial(Server, model, settings)) for settings in settings_of_ours(args)
    ]
    contenders = [Contender(OURS, ours, build_requests(images, "raw", host=HOST, path="/predict?top_k=1"))]
    for name, choices in rivals.items():
        try:
            python = environment(name, args.environments)
        except BenchmarkError as error:
            leave_out(name, error)
            continue
        form, path, headers = choices[0].form, choices[0].path, choices[0].headers
        requests = build_requests(images, form, host=HOST, path=path, headers=headers)
        candidates = [
            Candidate(describe_settings(choice.settings), partial(RivalServer, choice, python, model, requests[0]))
            for choice in choices
        ]
        contenders.append(Contender(choices[0].title, candidates, requests))
    return contenders


def leave_out(what: str, why: BenchmarkError) -> None:
    """Say that something takes no part any more."""
    print(f"{what} is left out: {why}\n", file=sys.stderr, flush=True)


def settings_of_ours(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return our service's candidates: for a model of one's own the defaults, and the file that the rivals run."""
    base = SETTINGS if args.model is None else OWN_MODEL
    given = parse_settings(args.service)
    tried = [base | {"workers": number} | given for number in WORKERS]
    return tried[:1] if "workers" in given else tried


def describe_settings(settings: Mapping[str, object]) -> str:
    """Write settings for people."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def check(title: str, requests: Sequence[bytes], port: int, expected: Expected) -> None:
    """Send every image once and hold the labels against onnxruntime's.

    Raises:
        BenchmarkError: an answer is not 200, or has another label.
    """
    load = run_load(Plan(HOST, port, requests, connections=16, keep_bodies=True))
    reject_wrong_labels(load.records, expected)
    if errors := summarize(load).errors:
        body = next(body for body, status in zip(load.records.body, load.records.status, strict=True) if status != 200)
        raise BenchmarkError(f"{title}: not every answer is right: {errors}, as {body[:200]!r}")


def load(
    server: Server | RivalServer,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    generator: str,
    expected: Expected,
) -> Summary:
    """Load a server in a closed loop; the Python generator also checks every label.

    Raises:
        BenchmarkError: it can't be reached.
    """
    cpu = partial(tree_cpu_seconds, server.pid)
    if generator == "wrk":
        return run_wrk(server.port, requests, connections, seconds=seconds, warmup_s=WARMUP_S, server_cpu=cpu)
    plan = Plan(HOST, server.port, requests, connections, seconds=WARMUP_S + seconds, keep_bodies=True)
    found = run_load(plan, warmup_s=WARMUP_S, server_cpu=cpu)
    reject_wrong_labels(found.records, expected)
    return summarize(found)


def search(contender: Contender, connections: int, args: argparse.Namespace, expected: Expected) -> None:
    """Measure each candidate once.

    Raises:
        BenchmarkError: none can be started and answers rightly, with what the last one said; or one of ours can't.
    """
    failure = None
    for candidate in contender.candidates.copy():
        try:
            with candidate.open() as server:
                check(contender.title, contender.requests, server.port, expected)
                summary = load(server, contender.requests, connections, args.search_seconds, args.generator, expected)
                candidate.found = 0.0 if summary.errors else summary.images_per_second
        except BenchmarkError as error:
            if contender.title == OURS:
                raise
            failure = error
            contender.candidates.remove(candidate)
            leave_out(f"{contender.title} with {candidate.settings}", error)
    if failure and not contender.candidates:
        raise failure


def describe_search(contender: Contender) -> str:
    """Say what each candidate answered, images a second."""
    return "; ".join(f"{candidate.settings}: {candidate.found:.0f}" for candidate in contender.candidates)


def measure(contender: Contender, connections: int, args: argparse.Namespace, expected: Expected) -> None:
    """Run one round: start it, check an image each, load it, stop it.

    Alone on the machine: some rivals poll, and would take time from the others while they wait for their turn.

    Raises:
        BenchmarkError: it can't be started, or its answers are wrong.
    """
    with contender.best.open() as server:
        check(contender.title, contender.requests, server.port, expected)
        summary = load(server, contender.requests, connections, args.seconds, args.generator, expected)
        if (memory := tree_memory_bytes(server.pid)) is not None:
            contender.memory_bytes.append(memory)
    contender.summaries.append(summary)


def run_each(contenders: list[Contender], first: int, step: Callable[[Contender], None]) -> None:
    """Do something with each, beginning with number `first`; one that fails takes no part any more.

    Raises:
        BenchmarkError: our own service failed.
    """
    for contender in contenders[first:] + contenders[:first]:
        try:
            step(contender)
        except BenchmarkError as error:
            if contender.title == OURS:
                raise
            leave_out(contender.title, error)
            contenders.remove(contender)


def compare(
    contenders: list[Contender], connections: int, args: argparse.Namespace, expected: Expected
) -> dict[str, str]:
    """Search and run all rounds, in another order each; what fails is removed from the list.

    Returns:
        what the search found, by server.

    Raises:
        BenchmarkError: our own service failed.
    """
    run_each(contenders, 0, partial(search, connections=connections, args=args, expected=expected))
    step = partial(measure, connections=connections, args=args, expected=expected)
    found = {f"{item.title}, connections={connections}": describe_search(item) for item in contenders}
    print_run(found)
    for number in range(args.rounds):
        run_each(contenders, number % len(contenders), step)
    return found


def rows_of(contenders: Sequence[Contender], connections: int) -> list[dict[str, object]]:
    """One row a server, medians over its rounds; `ours_by_it` is our images a second by the server's in that round."""
    rates = [[summary.images_per_second for summary in item.summaries] for item in contenders]
    return [
        {
            "connections": connections,
            "server": item.title,
            **over_rounds("ours_by_it", [ours / its if its else None for ours, its in zip(rates[0], own, strict=True)]),
            **medians(item.summaries),
            "memory_mib": median(item.memory_bytes) / 2**20 if item.memory_bytes else None,
            "settings": item.best.settings,
        }
        for item, own in zip(contenders, rates, strict=True)
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


def describe(rivals: Iterable[str], args: argparse.Namespace, side: int) -> dict[str, str]:
    """Say how it is measured, and with which versions of the rivals."""
    about = describe_run() | {
        "generator": wrk_version() if args.generator == "wrk" else "python -m benchmarks.generator",
        "method": f"{args.rounds} rounds of {args.seconds:g} s in turn, in another order each, median (minimum to "
        f"maximum); closed loop; JPEGs of {side} x {side}; each server with what answered most in a search with "
        f"{args.search_seconds:g} s a candidate",
    }
    for name in rivals:
        packages = (FRAMEWORKS[name].package, "onnxruntime", "numpy")
        about[name] = ", ".join(line for line in requirements(name).splitlines() if line.startswith(packages))
    return about


def main() -> int:
    """Start, check, search, measure in turn, print, write."""
    args = parse_arguments()
    rivals = {count: choose(args.only, args.setting, usable_cores(), count) for count in args.connections}
    rows: list[dict[str, object]] = []
    searched: dict[str, str] = {}
    if args.generator == "wrk":
        find_wrk()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder)) if args.model is None else find_model(args.model)
        side = side_of(model)
        about = describe(rivals[args.connections[0]], args, side)
        print_run(about)
        images = generate_images(IMAGES, side, "jpeg")
        expected = expect(model.path / MODEL_FILE, images)
        for count in args.connections:
            contenders = enter(rivals[count], model, images, args)
            searched |= compare(contenders, count, args, expected)
            rows += rows_of(contenders, count)
    report(rows, about | searched, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main)
