"""What explanations cost those who only want labels: `python -m benchmarks.explaining [MODEL]`.

Single images arrive at `/predict` at fixed times, in turn alone and beside clients that ask `/explain` without a pause.
The promise: an explanation delays a prediction by one batch at most.
"""

import argparse
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx

from benchmarks.common import describe_run, find_model, print_run, report, run_command
from benchmarks.generator import Plan, arrival_times
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import Summary, over_rounds, summarize
from service.engine.metadata import MODEL_FILE
from service.engine.session import read_metadata

WARMUP_S = 1.0
CONNECTIONS = 64
TIMEOUT_S = 60.0
REFUSED = (503, 504)  # where others leave no room; the client asks again


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explaining", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/perceiver-cifar100"), help="model folder")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second to /predict")
    parser.add_argument("--clients", type=int, default=2, help="that ask /explain")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turn")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args()


@contextmanager
def explainers(url: str, image: bytes, count: int) -> Iterator[Counter[int]]:
    """Ask `/explain` from so many threads while the block runs; yields the answers by their status, as they come.

    Raises:
        httpx.HTTPError: at the end of the block, where an answer is neither a map nor a refusal for want of room.
    """
    stop, answers = threading.Event(), Counter[int]()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            while not stop.is_set():
                response = client.post("/explain", content=image, headers={"content-type": "image/jpeg"})
                if response.status_code not in REFUSED:
                    response.raise_for_status()
                answers[response.status_code] += 1

    with ThreadPoolExecutor(max(count, 1)) as pool:
        asking = [pool.submit(ask) for _ in range(count)]
        try:
            yield answers
        finally:
            stop.set()
    for each in asking:
        each.result()


def row_of(kind: str, summaries: Sequence[Summary], explanations: float, refused: int) -> dict[str, object]:
    """Reduce the rounds of one kind to medians with their range, in milliseconds."""
    phases = [summary.phases_ms["inference"] for summary in summaries]
    return {
        "predictions": kind,
        **over_rounds("p50_ms", [summary.latency_ms["p50"] for summary in summaries]),
        **over_rounds("p99_ms", [summary.latency_ms["p99"] for summary in summaries]),
        "batch_p50_ms": median(phase["p50"] for phase in phases),
        "batch_max_ms": max(phase["max"] for phase in phases),
        "explanations_per_s": explanations,
        "explanations_refused": refused,
        "errors": sum(sum(summary.errors.values()) for summary in summaries),
    }


def main() -> int:
    """Measure in turn, print, write."""
    args = parse_arguments()
    model = find_model(args.model)
    height, width = read_metadata(model.path / MODEL_FILE).input_size
    image = generate_images(1, max(height, width), "jpeg")[0].data
    about = describe_run() | {
        "method": f"{args.rounds} rounds of {args.seconds:g} s in turn; {args.rate:g} single images a second at even "
        f"times, latency from the scheduled time; beside them {args.clients} clients that explain without a pause"
    }
    print_run(about)
    clients = {"alone": 0, "beside explanations": args.clients}
    measured: dict[str, list[Summary]] = {kind: [] for kind in clients}
    explained = {kind: Counter[int]() for kind in clients}
    with ExitStack() as stack:
        server = stack.enter_context(Server(model, parse_settings(args.setting)))
        requests = build_requests(generate_images(64, max(height, width), "jpeg"), "raw", host=HOST)
        seconds = WARMUP_S + args.seconds
        plan = Plan(HOST, server.port, requests, CONNECTIONS, arrivals=arrival_times(args.rate, seconds, "even"))
        for _ in range(args.rounds):
            for kind, count in clients.items():
                with explainers(server.url, image, count) as answers:
                    measured[kind].append(summarize(run_load(plan, warmup_s=WARMUP_S)))
                    explained[kind] += answers
    rows = [
        row_of(
            kind,
            summaries,
            explained[kind][200] / args.rounds / seconds,
            sum(explained[kind][code] for code in REFUSED),
        )
        for kind, summaries in measured.items()
    ]
    report(rows, about, args.csv)
    longer = [
        beside.latency_ms["p99"] - alone.latency_ms["p99"]
        for alone, beside in zip(measured["alone"], measured["beside explanations"], strict=True)
    ]
    print(f"p99 longer by {median(longer):.1f} ms ({min(longer):.1f} to {max(longer):.1f} over the rounds)")
    return 0


if __name__ == "__main__":
    run_command(main)
