"""The service that is misused, and how to tell whether it is well afterwards."""

import time
from dataclasses import dataclass
from typing import Self

import httpx

from tests.chaos.client import IMAGES
from tests.end_to_end.process import Process

# Small limits, so that small misdeeds exceed them.
LIMITS = (
    "--max-body-bytes=2000000",
    "--max-pixels=4000000",
    "--header-timeout-s=0.3",
    "--body-timeout-s=1",
    "--decode-processes=2",
    "--max-queue-size=256",
)
MEMORY_GROWTH = 64 * 1024 * 1024
AT_REST = {
    "perceiver_ready": 1,
    "perceiver_admitted_images": 0,
    "perceiver_queue_length": 0,
}


@dataclass(frozen=True)
class Vitals:
    """What must be as before: open files, memory (bytes) within bounds, nothing left in flight, and an answer."""

    open_files: int
    memory: int
    answer: bytes
    at_rest: dict[str, int]
    traceback: str

    @classmethod
    def of(cls, process: Process, client: httpx.Client) -> Self:
        """Look, when the connections of others are closed."""
        process.wait(lambda: "perceiver_admitted_bytes 0.0" in client.get("/metrics").text)
        files = [-1, -2]
        while files[-1] != files[-2]:
            time.sleep(0.3)
            files.append(sample(client, "process_open_fds"))
        return cls(
            open_files=files[-1],
            memory=sample(client, "process_resident_memory_bytes"),
            answer=predict(client),
            at_rest={name: sample(client, name) for name in AT_REST},
            traceback=process.stderr[-3000:] if "Traceback" in process.stderr else "",
        )

    def __str__(self) -> str:
        return f"{self.open_files} files open, {self.memory / 2**20:.1f} MiB resident"

    def complaints(self, now: "Vitals") -> list[str]:
        """What is not as it was."""
        found = []
        if now.open_files > self.open_files:
            found.append(f"{now.open_files} files are open, and {self.open_files} were")
        if now.memory > self.memory + MEMORY_GROWTH:
            found.append(f"{now.memory >> 20} MiB are in use, and {self.memory >> 20} were")
        if now.answer != self.answer:
            found.append(f"the answer to the same image was {self.answer!r} and is {now.answer!r}")
        found += [f"{name} is {now.at_rest[name]}" for name, value in AT_REST.items() if now.at_rest[name] != value]
        return [*found, now.traceback] if now.traceback else found


def sample(client: httpx.Client, name: str) -> int:
    """The sum of a metric over all labels; 0 where the platform does not have it, as macOS those of processes."""
    lines = client.get("/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.split()[0].partition("{")[0] == name))


def predict(client: httpx.Client) -> bytes:
    """The answer to a normal request."""
    response = client.post("/predict", content=IMAGES["PNG"], headers={"content-type": "image/png"})
    assert response.status_code == 200, response.text
    return response.content
