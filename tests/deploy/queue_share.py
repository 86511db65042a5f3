"""python -m tests.deploy.queue_share: how much of the queue is taken, and the latency, at several loads.

The table of docs/kubernetes.md, by which a threshold is chosen. The model is tiny and runs on a stand-in device that
takes 100 ms a batch of up to 32 images, so that the device is the limit and not the cores, as with a GPU.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.generator import Plan, arrival_times
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import Load, run_load
from tests.chaos.overload import rate_of_answers
from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder

RUN_MS, MAX_BATCH_SIZE, MAX_QUEUE_SIZE = 100, 32, 512
READING_S = 0.1


class Share(threading.Thread):
    """Reads the share of the queue that is taken, as Prometheus does and more often, until `stop` is set."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.readings: list[tuple[float, float]] = []
        self._url = url

    def run(self) -> None:
        with httpx.Client() as client:
            while not self.stop.wait(READING_S):
                text = client.get(f"{self._url}/metrics").text
                found = re.search(r"^perceiver_admitted_images (\S+)$", text, re.MULTILINE)
                assert found is not None
                self.readings.append((time.monotonic(), float(found[1]) / MAX_QUEUE_SIZE))

    def mean(self, load: Load) -> float:
        return float(np.mean([share for moment, share in self.readings if load.begin <= moment < load.end]))


def measure(plan: Plan, url: str, settling_s: float) -> tuple[Load, float]:
    """Send, and return what came of it with the mean share."""
    share = Share(url)
    share.start()
    try:
        load = run_load(plan, warmup_s=settling_s)
    finally:
        share.stop.set()
        share.join()
    return load, share.mean(load)


def row(name: str, load: Load, share: float) -> str:
    """One line of the table."""
    records = load.records
    scheduled, ended, status = (np.array(values) for values in (records.scheduled, records.ended, records.status))
    counts = (scheduled >= load.begin) & (scheduled < load.end)
    waited = 1000 * (ended - scheduled)[counts & (status == 200)]
    refused = np.mean(status[counts] == 503)
    assert set(status[counts]) <= {200, 503}
    late = 1000 * np.max(np.array(records.sent)[counts] - scheduled[counts])
    return (
        f"| {name} | {counts.sum() / load.seconds:.0f} | {rate_of_answers(load):.0f} | {share:.3f} | "
        f"{np.median(waited):.0f} | {np.quantile(waited, 0.99):.0f} | {refused:.1%} | {late:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settling", type=float, default=3, help="seconds of each load that do not count")
    parser.add_argument("--seconds", type=float, default=20, help="that count, of each load")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.1, 1.5], help="by capacity"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model_folder(folder / "m")
        limits = (
            "--max-batch-size",
            str(MAX_BATCH_SIZE),
            "--max-queue-size",
            str(MAX_QUEUE_SIZE),
            "--cpu-engines",
            "1",
        )
        arguments = on_model(folder / "m", *limits)
        with started(folder, *arguments, module=MODULE, **{VARIABLE: str(RUN_MS)}) as process, process.ready():
            url = process.url()
            address = urlsplit(url)
            assert address.hostname is not None
            assert address.port is not None
            requests = build_requests(generate_images(64, 32, "jpeg", 0), "raw", host=address.netloc)
            seconds = args.settling + args.seconds
            plan = Plan(address.hostname, address.port, requests, MAX_QUEUE_SIZE + 256, seconds=seconds)
            # The queue is full all the time: no more can be answered.
            closed = replace(plan, connections=MAX_QUEUE_SIZE)
            capacity = rate_of_answers(run_load(closed, warmup_s=args.settling))
            print(f"capacity: {capacity:.0f} images a second")
            print("| load | offered | answered | share | median ms | p99 ms | 503 | late by ms |")
            for factor in args.loads:
                arrivals = arrival_times(factor * capacity, seconds, "poisson")
                print(row(f"{factor:g}", *measure(replace(plan, arrivals=arrivals), url, args.settling)), flush=True)


if __name__ == "__main__":
    main()
