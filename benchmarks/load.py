"""HTTP load on a service that is started for it, or runs already: `python -m benchmarks.load --model DIR --rate 200`.

Open loop (`--rate`): arrivals fixed in advance, latency from the scheduled time. Closed loop (`--concurrency`): each
connection sends when its last answer is there.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks.common import BenchmarkError, describe_run, find_model, print_run, run_command, write_csv
from benchmarks.generator import Plan, arrival_times
from benchmarks.payloads import ImageFile, build_requests, generate_images, read_images
from benchmarks.processes import run_load
from benchmarks.server import Server, cpu_seconds, parse_settings
from benchmarks.summary import csv_row, format_summary, summarize

DEFAULT_OPEN_CONNECTIONS = 256


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    server = parser.add_argument_group("server")
    which = server.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="start the service with this model folder")
    which.add_argument("--url", help="use the service at http://HOST:PORT")
    server.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the started service")
    server.add_argument("--pid", type=int, help="with --url: process whose CPU time is read, on this machine")
    load = parser.add_argument_group("load")
    loop = load.add_mutually_exclusive_group(required=True)
    loop.add_argument("--rate", type=float, help="open loop: requests a second")
    loop.add_argument("--concurrency", type=int, nargs="+", help="closed loop: requests at once; several, one by one")
    load.add_argument("--arrivals", choices=("poisson", "even"), default="poisson", help="of the open loop")
    load.add_argument("--seconds", type=float, default=10.0, help="that count")
    load.add_argument("--warmup", type=float, default=1.0, help="seconds before, that do not")
    load.add_argument("--timeout", type=float, default=30.0, help="seconds after which a client gives up")
    load.add_argument("--connections", type=int, default=DEFAULT_OPEN_CONNECTIONS, help="open loop: at most")
    load.add_argument("--processes", type=int, default=1, help="of the load generator")
    load.add_argument("--seed", type=int, default=0, help="of arrivals and images")
    images = parser.add_argument_group("images")
    images.add_argument("--images", type=Path, metavar="FOLDER", help="image files; else they are made")
    images.add_argument("--size", type=int, default=32, help="side of those made, in pixels")
    images.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="of those made")
    images.add_argument("--count", type=int, default=256, help="different images, at most")
    images.add_argument("--body", choices=("raw", "multipart", "json"), default="raw")
    images.add_argument("--per-request", type=int, default=1, help="images in a request (multipart and json)")
    images.add_argument("--path", default="/predict", help="with the query, as /predict?top_k=1")
    images.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    parser.add_argument("--csv", type=Path, help="write the figures; a bare name goes to benchmarks/results/")
    return parser.parse_args()


def parse_headers(texts: Sequence[str]) -> dict[str, str]:
    """Read ["Name: value", ...].

    Raises:
        BenchmarkError: there is no colon.
    """
    for text in texts:
        if ":" not in text:
            raise BenchmarkError(f"--header {text}: must have the form NAME:VALUE")
    return {name.strip(): value.strip() for name, _, value in (text.partition(":") for text in texts)}


def parse_url(url: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        BenchmarkError: not http, or without a host.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise BenchmarkError(f"--url {url}: must have the form http://HOST:PORT; TLS is not spoken here")
    return parts.hostname, parts.port or 80


def choose_images(args: argparse.Namespace) -> list[ImageFile]:
    """Read or make the images that the command line asks for."""
    if args.images:
        return read_images(args.images, args.count)
    return generate_images(args.count, args.size, args.format, args.seed)


def describe_images(images: Sequence[ImageFile], args: argparse.Namespace) -> str:
    """Say what is sent."""
    size = median(len(image.data) for image in images)
    origin = "from a folder" if args.images else f"made, {args.size} x {args.size} {args.format}"
    return f"{len(images)} {origin}, median {size:.0f} bytes, {args.body} body, {args.per_request} a request"


def open_server(args: argparse.Namespace, stack: ExitStack) -> tuple[str, int, Callable[[], float | None]]:
    """Start the service or find it; return host, port and what reads its CPU seconds."""
    if args.url:
        host, port = parse_url(args.url)
        return host, port, lambda: None if args.pid is None else cpu_seconds(args.pid)
    server = stack.enter_context(Server(find_model(args.model), parse_settings(args.setting)))
    return "127.0.0.1", server.port, server.cpu_seconds


def make_plans(args: argparse.Namespace, host: str, port: int, requests: Sequence[bytes]) -> dict[str, Plan]:
    """One plan a loop, by its description."""
    seconds = args.warmup + args.seconds
    plan = Plan(host, port, requests, connections=args.connections, seconds=seconds, timeout_s=args.timeout)
    if args.rate is not None:
        arrivals = arrival_times(args.rate, seconds, args.arrivals, args.seed)
        return {f"open loop, {args.rate:g} requests/s, {args.arrivals}": replace(plan, arrivals=arrivals)}
    return {
        f"closed loop, concurrency {concurrency}": replace(plan, connections=concurrency)
        for concurrency in args.concurrency
    }


def main() -> int:
    """Send, print, write."""
    args = parse_arguments()
    images = choose_images(args)
    about = describe_run() | {"images": describe_images(images, args)}
    print_run(about)
    rows = []
    with ExitStack() as stack:
        host, port, cpu = open_server(args, stack)
        requests = build_requests(
            images,
            args.body,
            host=f"{host}:{port}",
            path=args.path,
            per_request=args.per_request,
            headers=parse_headers(args.header),
        )
        for title, plan in make_plans(args, host, port, requests).items():
            load = run_load(plan, warmup_s=args.warmup, processes=args.processes, server_cpu=cpu)
            summary = summarize(load, args.per_request)
            print(f"{title}, {args.seconds:g} s\n{format_summary(summary)}\n", flush=True)
            rows.append({"load": title, "seconds": args.seconds, **csv_row(summary)})
    if args.csv:
        print(f"written: {write_csv(args.csv, rows, about)}")
    return 0


if __name__ == "__main__":
    run_command(main)
