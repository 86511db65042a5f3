"""python -m tests.chaos: send thousands of misdeeds to a real service, then ask it whether it is well."""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.client import rampage
from tests.chaos.service import LIMITS, Vitals
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder


def main() -> int:
    """Print a report; return 0 if nothing was surprising and the service is as it was."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="misdeeds to send (default: 10000)")
    parser.add_argument("--concurrency", type=int, default=64, help="connections at a time (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same misdeeds (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model_folder(path / "m")
        with started(path, *on_model(path / "m", *LIMITS)) as process, process.ready() as client:
            address = (client.base_url.host, client.base_url.port or 0)
            asyncio.run(rampage(*address, requests=500, concurrency=options.concurrency, seed=-1))  # to its full size
            before = Vitals.of(process, client)
            begun = time.perf_counter()
            report = asyncio.run(
                rampage(*address, requests=options.requests, concurrency=options.concurrency, seed=options.seed)
            )
            print(report)
            print(f"{options.requests} requests in {time.perf_counter() - begun:.1f} s")
            complaints = report.surprises + before.complaints(process, client)
            print("\n".join(complaints) or "nothing surprising, and the service is as it was")
            process.signal()
            return 1 if complaints or process.exit_status() != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
