"""What a request costs apart from the model: `python -m benchmarks.request_path`.

A tiny model, small JPEGs, 64 connections, on the same cores as the generator. Raw body, raw body apart from its head,
and multipart form are measured in turn. Beside them the floor: a bare ASGI app with the same engine and none of the
service's promises. `--before CHECKOUT` measures the service of another commit in turn, too, and prints the ratios.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles

from benchmarks.common import BenchmarkError, describe_run, print_run, report, run_command
from benchmarks.generator import Plan
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import Summary, medians, summarize
from benchmarks.tiny_model import SIDE, make_tiny_model

IMAGES = 256
BEFORE = "before: "
# One thread runs the tiny model fastest, and leaves the other cores to the event loop and the load.
SETTINGS = {"provider": "cpu", "intra_op_threads": "1", "max_batch_size": "32"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.request_path", description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before, that do not count")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turn")
    parser.add_argument("--processes", type=int, default=1, help="of the load generator")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of another commit, to compare with")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    """Measure in turn, print, write."""
    args = parse_arguments()
    if args.before is not None and not (args.before / "service").is_dir():
        raise BenchmarkError(f"--before {args.before}: is no checkout of this project; it has no service/")
    settings = SETTINGS | parse_settings(args.setting)
    about = describe_run() | {
        "method": f"{args.rounds} rounds of {args.seconds:g} s in turn, medians; closed loop, {args.connections} "
        f"connections; JPEGs of {SIDE} x {SIDE}; {', '.join(f'{name}={value}' for name, value in settings.items())}"
    }
    print_run(about)
    images = generate_images(IMAGES, SIDE, "jpeg")
    with ExitStack() as stack:
        model = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        service = stack.enter_context(Server(model, settings))
        floor = stack.enter_context(Server(model, command=("-m", "benchmarks.floor")))
        raw = build_requests(images, "raw", host=HOST)
        kinds = {
            "service, raw body": (service, raw),
            "service, head and body apart": (service, raw),
            "service, multipart": (service, build_requests(images, "multipart", host=HOST)),
            "floor, raw body": (floor, raw),
        }
        if args.before is not None:
            before = stack.enter_context(Server(model, settings, checkout=args.before))
            kinds |= {f"{BEFORE}{name}": (before, requests) for name, (_, requests) in list(kinds.items())[:-1]}
        measured: dict[str, list[Summary]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, (server, requests) in kinds.items():
                seconds = args.warmup + args.seconds
                plan = Plan(HOST, server.port, requests, args.connections, seconds, apart="apart" in name)
                load = run_load(plan, warmup_s=args.warmup, processes=args.processes, server_cpu=server.cpu_seconds)
                measured[name].append(summarize(load))
    rows = [{"request": name, **medians(summaries)} for name, summaries in measured.items()]
    report(rows, about, args.csv)
    for name in (name for name in kinds if BEFORE + name in kinds):
        pairs = zip(measured[name], measured[BEFORE + name], strict=True)
        ratios = [
            now.server_cpu_ms / then.server_cpu_ms for now, then in pairs if now.server_cpu_ms and then.server_cpu_ms
        ]
        if len(ratios) > 1:
            low, middle, high = quantiles(ratios, n=4)
            print(f"{name}: {middle:.3f} of the CPU time before, quartiles {low:.3f} to {high:.3f}, n = {len(ratios)}")
    return 0


if __name__ == "__main__":
    run_command(main)
