"""What HTTP and batching take away from the engine: `python -m benchmarks.overhead MODEL`.

Two comparisons, both sides in turn within one run:

    throughput   closed loop over HTTP against the engine alone at its best batch size: the ratio
    latency      a single client's median against the engine's batch of one plus the decoding: the difference
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import describe_run, find_model, format_table, print_run, run_command, write_csv
from benchmarks.engine import Cell
from benchmarks.generator import Plan
from benchmarks.payloads import ImageFile, build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import Summary, summarize
from imaging.decoder import decode
from imaging.formats import read_header
from service.engine.onnx_engine import Engine, OnnxEngine
from service.engine.session import EngineError, choose_file, resolve_provider

MAX_PIXELS = 50_000_000


@dataclass
class Measured:
    """What the rounds gave: engine by batch size, HTTP at the given concurrency and alone, decode seconds."""

    engine: dict[int, Cell]
    many: list[Summary] = field(default_factory=list)
    single: list[Summary] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder or version folder")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 16, 32), help="of the engine; 1 is added")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement; many batches should fit in")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before each HTTP load, at least one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run, on both sides")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--format", choices=("jpeg", "png"), default="jpeg")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    parser.add_argument("--csv", type=Path, help="write the figures; a bare name goes to benchmarks/results/")
    return parser.parse_args()


def decode_seconds(images: Sequence[ImageFile], engine: Engine) -> list[float]:
    """Decode each image once, as the service does, and time it."""
    durations = []
    for image in images:
        start = time.perf_counter()
        header = read_header(image.data, max_pixels=MAX_PIXELS)
        resize = engine.metadata.resize
        decode(header, size=engine.metadata.input_size, crop=resize.crop, resample=resize.filter)
        durations.append(time.perf_counter() - start)
    return durations


def measure(args: argparse.Namespace, engine: Engine, server: Server, images: Sequence[ImageFile]) -> Measured:
    """Measure everything once a round."""
    measured = Measured({batch: Cell() for batch in sorted({1, *args.batches})})
    requests = build_requests(images, "raw", host=HOST)
    rng = np.random.default_rng(0)
    for _ in range(args.rounds):
        for batch, cell in measured.engine.items():
            pixels = rng.integers(0, 256, (batch, *engine.metadata.input_size, 3), dtype=np.uint8)
            cell.measure(engine, pixels, args.seconds / len(measured.engine))
        measured.decode += decode_seconds(images, engine)
        for connections, summaries in ((args.concurrency, measured.many), (1, measured.single)):
            plan = Plan(HOST, server.port, requests, connections, seconds=args.warmup + args.seconds)
            summaries.append(summarize(run_load(plan, warmup_s=args.warmup, server_cpu=server.cpu_seconds)))
    return measured


def verdict(measured: Measured, concurrency: int) -> dict[str, object]:
    """Reduce to the two figures and what they come from; milliseconds and images a second."""
    rates = {batch: batch / median(cell.wall) for batch, cell in measured.engine.items()}
    best = max(rates, key=rates.__getitem__)
    over_http = median(summary.images_per_second for summary in measured.many)
    alone = median(measured.engine[1].wall) * 1e3
    decode = median(measured.decode) * 1e3
    client = median(summary.latency_ms.get("p50", float("nan")) for summary in measured.single)
    return {
        "engine_best_batch": best,
        "engine_images_per_s": rates[best],
        "http_concurrency": concurrency,
        "http_images_per_s": over_http,
        "throughput_ratio": over_http / rates[best],
        "engine_batch_1_ms": alone,
        "decode_ms": decode,
        "single_client_p50_ms": client,
        "latency_difference_ms": client - alone - decode,
        "errors": sum(sum(summary.errors.values()) for summary in [*measured.many, *measured.single]),
    }


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    model = find_model(args.model)
    file = choose_file(model.path, resolve_provider(args.provider))
    same = {"provider": args.provider, "intra_op_threads": str(args.threads), "cpu_engines": "1"}
    settings = same | parse_settings(args.setting)
    about = describe_run() | {
        "method": f"{args.rounds} rounds in turn of {args.seconds:g} s: engine alone, HTTP at concurrency "
        f"{args.concurrency}, HTTP with one client; raw {args.format} of {args.size} x {args.size}; medians"
    }
    print_run(about)
    limit = max(1, *args.batches)
    engine = OnnxEngine(file, provider=args.provider, max_batch_size=limit, intra_op_threads=args.threads)
    with Server(model, settings) as server:
        measured = measure(args, engine, server, generate_images(256, args.size, args.format))
    print(format_table([{"batch": b, "images_per_s": b / median(c.wall)} for b, c in measured.engine.items()]), "\n")
    figures = verdict(measured, args.concurrency)
    print(format_table([{"figure": name, "value": value} for name, value in figures.items()]))
    if args.csv:
        print(f"\nwritten: {write_csv(args.csv, [figures], about)}")
    return 0


if __name__ == "__main__":
    run_command(main, EngineError)
