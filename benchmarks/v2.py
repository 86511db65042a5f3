"""Binary tensors by the Open Inference Protocol v2 beside files to /predict: `python -m benchmarks.v2`.

A tiny model, images of its size, in turn: raw JPEG to /predict, and `images` of 1, 8 and 64 in binary to /v2.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.common import describe_run, print_run, report, run_command
from benchmarks.generator import Plan
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import run_load
from benchmarks.request_path import IMAGES, SETTINGS
from benchmarks.server import HOST, Server
from benchmarks.summary import Summary, medians, summarize
from benchmarks.tiny_model import SIDE, make_tiny_model

SIZES = (1, 8, 64)


def build_infer_requests(model: str, per_request: int, count: int) -> list[bytes]:
    """Build requests whose JSON `per_request` images of noise follow."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(count):
        pixels = rng.integers(0, 256, (per_request, SIDE, SIDE, 3), dtype=np.uint8)
        tensor = {"name": "images", "datatype": "UINT8", "shape": pixels.shape}
        tensor["parameters"] = {"binary_data_size": pixels.nbytes}
        content = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        text = json.dumps(content).encode()
        head = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(text) + pixels.nbytes}\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
        )
        requests.append(head.encode() + text + pixels.tobytes())
    return requests


def main() -> int:
    """Measure in turn, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.v2", description=__doc__)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before, that do not count")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turn")
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    args = parser.parse_args()
    about = describe_run() | {
        "method": f"{args.rounds} rounds of {args.seconds:g} s in turn, medians; closed loop, {args.connections} "
        f"connections; images of {SIDE} x {SIDE}; {', '.join(f'{name}={value}' for name, value in SETTINGS.items())}"
    }
    print_run(about)
    with ExitStack() as stack:
        folder = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        server = stack.enter_context(Server(folder, SETTINGS))
        kinds = {"/predict, raw JPEG": (1, build_requests(generate_images(IMAGES, SIDE, "jpeg"), "raw", host=HOST))}
        for size in SIZES:
            kinds[f"/v2, images of {size}"] = (size, build_infer_requests("tiny", size, IMAGES // size))
        measured: dict[str, list[Summary]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, (size, requests) in kinds.items():
                plan = Plan(HOST, server.port, requests, args.connections, args.warmup + args.seconds)
                load = run_load(plan, warmup_s=args.warmup, processes=1, server_cpu=server.cpu_seconds)
                measured[name].append(summarize(load, size))
    rows = [{"request": name, **medians(summaries)} for name, summaries in measured.items()]
    report(rows, about, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main)
