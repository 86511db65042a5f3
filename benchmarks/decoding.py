"""What decoding an image in a process costs, beside a thread: `python -m benchmarks.decoding`.

One image after another, in turn: on a thread of this process, and in a decode process of the service. The difference is
the way there and back.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.common import describe_run, print_run, report, run_command
from benchmarks.payloads import generate_images
from benchmarks.rivals.process_tree import tree_cpu_seconds
from service.decoding.decode_process import Job, work
from service.decoding.decoder import limits_of
from service.decoding.process_pool import ProcessPool
from service.settings import Settings

MODEL_SIZE = (32, 32)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 300, 1414], help="sides of the JPEGs, in pixels")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turn")
    parser.add_argument("--csv", type=Path, help="write the table; a bare name goes to benchmarks/results/")
    return parser.parse_args()


async def measure(decode: Callable[[], Awaitable[object]], seconds: float) -> tuple[float, float]:
    """Return milliseconds and CPU milliseconds of one call, over so many seconds."""
    count, cpu, begun = 0, tree_cpu_seconds(os.getpid()) or 0.0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        await decode()
        count += 1
    passed = time.perf_counter() - begun
    return 1e3 * passed / count, 1e3 * ((tree_cpu_seconds(os.getpid()) or 0.0) - cpu) / count


async def rows_of(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure each size."""
    settings = Settings()
    limits = limits_of(settings)
    job = Job(MODEL_SIZE, "center", "bicubic", settings.image_formats, 10**8, 10**8, 10**8)
    pool, threads, loop = ProcessPool(1, limits, print), ThreadPoolExecutor(1), asyncio.get_running_loop()
    await pool.start()
    rows: list[dict[str, object]] = []
    for size in args.sizes:
        data = generate_images(1, size, "jpeg")[0].data
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "thread": lambda data=data: loop.run_in_executor(threads, work, job, data, limits),
            "process": lambda data=data: pool.run(job, data),
        }
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                seen[name].append(await measure(way, args.seconds))
        for name, figures in seen.items():
            more = median(figure[0] - other[0] for figure, other in zip(figures, seen["thread"], strict=True))
            rows.append(
                {
                    "side": size,
                    "bytes": len(data),
                    "way": name,
                    "ms": median(figure[0] for figure in figures),
                    "cpu_ms": median(figure[1] for figure in figures),
                    "ms_more": more,
                }
            )
    pool.close()
    threads.shutdown()
    return rows


def main() -> int:
    """Measure in turn, print, write."""
    args = parse_arguments()
    about = describe_run() | {"method": f"{args.rounds} rounds of {args.seconds:g} s in turn, medians; one at a time"}
    print_run(about)
    report(asyncio.run(rows_of(args)), about, args.csv)
    return 0


if __name__ == "__main__":
    run_command(main)
