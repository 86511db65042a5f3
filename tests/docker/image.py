"""A real load run for docs/dashboard.png: python -m tests.docker.image MODEL_FOLDER

Starts the service and a Prometheus with the shipped configuration, sends a load that rises above what the machine can
do and falls again, puts a new version and a broken one into the folder meanwhile, and draws the dashboard from that
Prometheus.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from benchmarks.payloads import generate_images
from service.repository.folder import list_versions
from tests.docker import stack
from tests.docker.files import DOCKER

SCRAPE_S = 2


async def send(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    """One request, whose answer nobody reads; a client that waits no longer leaves."""
    try:
        async with session.post(url, data=body, headers={"Content-Type": "image/jpeg"}) as answer:
            await answer.read()
    except TimeoutError:
        pass


async def load(url: str, seconds: float, peak: float) -> None:
    """Poisson arrivals whose rate climbs to `peak` a second in the middle and falls; one in fifty is no image."""
    rng = random.Random(0)
    bodies = [image.data for size in (64, 200, 500) for image in generate_images(8, size, "jpeg")]
    begin = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=4)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as tasks,
    ):
        while (now := (time.monotonic() - begin) / seconds) < 1:
            rate = peak * max(0.08, 1 - abs(2.6 * (now - 0.45)))
            body = rng.choice(bodies) if rng.random() > 0.02 else b"no image"
            tasks.create_task(send(session, url, body))
            await asyncio.sleep(rng.expovariate(rate))


async def change_versions(versions: Path, served: Path, seconds: float) -> None:
    """A new version after a quarter of the time, a broken one after four fifths."""
    await asyncio.sleep(seconds / 4)
    shutil.copytree(versions, served / ".2-writing")
    (served / ".2-writing").rename(served / "2")
    await asyncio.sleep(seconds * 0.55)
    shutil.copytree(versions, served / ".3-writing")
    (served / ".3-writing" / "model.onnx").write_bytes(b"half of a model")
    (served / ".3-writing").rename(served / "3")


async def both(url: str, version: Path, served: Path, seconds: float, peak: float) -> None:
    await asyncio.gather(load(url, seconds, peak), change_versions(version, served, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="model folder; its highest version is served")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--peak", type=float, default=120, help="requests a second in the middle")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, served = Path(name), Path(name) / "models"
        version = list_versions(args.model)[-1].path
        shutil.copytree(version, served / "1")
        seconds = args.minutes * 60
        with (
            stack.service(served, folder, provider="cpu", max_queue_size=64) as port,
            stack.prometheus(folder, port, SCRAPE_S) as server,
        ):
            time.sleep(10 * SCRAPE_S)
            asyncio.run(both(f"http://127.0.0.1:{port}/predict", version, served, seconds, args.peak))
            time.sleep(2 * SCRAPE_S)
            end = time.time()
            caption = (
                f"{args.model.name} on {os.cpu_count()} cores ({platform.machine()}), no GPU; "
                f"up to {args.peak:g} requests a second; dotted: a version, an alarm"
            )
            command = [sys.executable, DOCKER / "grafana" / "render.py", "--url", server.url, "--caption", caption]
            subprocess.run(
                [*command, "--end", str(end), "--minutes", str(args.minutes + 0.4), "--out", args.out], check=True
            )


if __name__ == "__main__":
    main()
