"""How soon the service is ready and how much memory it takes: `python -m benchmarks.startup MODEL`."""

import argparse
from pathlib import Path
from statistics import median

from benchmarks.common import ModelPlace, describe_run, find_model, print_run, report, run_command
from benchmarks.generator import Plan
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.server import HOST, Server, parse_settings

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder or version folder")
    parser.add_argument("--runs", type=int, default=5, help="starts")
    parser.add_argument("--requests", type=int, default=1000, help="sent before memory is read again")
    parser.add_argument("--concurrency", type=int, default=32, help="of these")
    parser.add_argument("--size", type=int, default=32, help="side of the JPEGs, in pixels")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args()


def measure_start(model: ModelPlace, args: argparse.Namespace, requests: list[bytes]) -> dict[str, float]:
    """Start, send, stop; return seconds to ready and MiB of resident memory (NaN where it can't be read)."""
    with Server(model, parse_settings(args.setting)) as server:
        at_ready = _mib(server.rss_bytes())
        load = run_load(Plan(HOST, server.port, requests, args.concurrency))
        return {
            "ready_s": server.seconds_to_ready,
            "rss_ready_mib": at_ready,
            "rss_after_mib": _mib(server.rss_bytes()),
            "answered": float(load.records.status.count(200)),
        }


def _mib(rss: int | None) -> float:
    return float("nan") if rss is None else rss / MIB


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    model = find_model(args.model)
    about = describe_run() | {
        "method": f"ready: from the start of the process to the first 200 of /health/ready; memory: resident, when "
        f"ready and after {args.requests} requests, {args.concurrency} at once, JPEGs of {args.size} x {args.size}"
    }
    print_run(about)
    requests = build_requests(generate_images(args.requests, args.size, "jpeg"), "raw", host=HOST)
    runs = [measure_start(model, args, requests) for _ in range(args.runs)]
    rows: list[dict[str, object]] = [{"run": str(number), **run} for number, run in enumerate(runs, 1)]
    rows.append({"run": "median", **{key: median(run[key] for run in runs) for key in runs[0]}})
    report(rows, about, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main)
