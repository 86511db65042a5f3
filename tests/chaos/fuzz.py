"""Mutated images for the decoder and mutated bodies for the parser, by the hundred thousand.

In processes of their own: a C library that crashes, hangs or takes all memory ends a child, and the report names the
input. Every input comes from the seed and its number alone, so that it can be made again.
"""

import logging
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from service.decoding.decode_process import DECODED, ERRORS, Job, work
from service.decoding.decoder import limits_of
from service.decoding.process_pool import Reply
from service.settings import Settings
from tests.service.mutation import BODIES, SIZE, V2_BODIES, Edit, decode, mutate, parse, parse_v2, variants

CHUNK = 10_000  # inputs a process
INPUT_TIMEOUT_S = 30.0  # for one input
ADDRESS_SPACE = 4 << 30
NOT_BEGUN = -1
SHOWN = 20  # surprises of one chunk that are told
SETTINGS = Settings()
MAX_CPU_S = SETTINGS.decode_cpu_s  # for one input
LIMITS = limits_of(SETTINGS)
JOB = Job(
    SIZE,
    "center",
    "bicubic",
    SETTINGS.image_formats,
    SETTINGS.max_pixels,
    SETTINGS.max_request_pixels,
    SETTINGS.max_request_pixels,
)

VARIANTS = variants()
NUMBERS = [
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\x80",
]
TEXT = [
    b'"',
    b"{",
    b"[",
    b"--b",
    b"\r\n",
    b"--b--\r\n",
    b"data:",
    b"=",
    b"\\u",
    b"Content-Disposition: form-data",
    b"\0",
]


@dataclass
class Findings:
    """What came out.

    Attributes:
        outcomes: how often each kind of input had each outcome, by (kind, outcome).
        slowest: seconds of CPU time, number and kind of the input that took most.
        peak_memory: bytes resident in a child at most.
        surprises: inputs that broke a promise.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, int, str] = (0.0, -1, "")
    peak_memory: int = 0
    surprises: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Take another chunk's findings in."""
        self.outcomes += other.outcomes
        self.slowest = max(self.slowest, other.slowest)
        self.peak_memory = max(self.peak_memory, other.peak_memory)
        self.surprises += other.surprises

    def __str__(self) -> str:
        by_outcome: Counter[str] = Counter()
        for (_, name), count in self.outcomes.items():
            by_outcome[name] += count
        rows = [f"  {name:24} {count:>8}" for name, count in by_outcome.most_common()]
        seconds, number, kind = self.slowest
        rows.append(f"  slowest: {seconds * 1000:.1f} ms of CPU time, input {number} ({kind})")
        rows.append(f"  peak memory of a process: {self.peak_memory >> 20} MiB")
        return "\n".join([*rows, *(f"  BROKEN: {surprise}" for surprise in self.surprises)])


def random_edits(rng: random.Random, words: list[bytes], length: int) -> list[Edit]:
    """Up to eight edits: noise, words that parsers stumble over, and losses; few, so that some get past the header."""
    return [
        (
            rng.choice(
                ["replace", "replace", "insert", "delete", "cut"] if number == 0 else ["replace", "insert", "delete"]
            ),
            rng.randrange(length + 1),
            rng.choice(words) if rng.random() < 0.4 else rng.randbytes(rng.randint(1, 8)),
        )
        for number in range(rng.choice([1, 1, 2, 3, 5, 8]))
    ]


def try_image(rng: random.Random) -> tuple[str, str]:
    """Decode one mutated image; some are two files grown together. Return its kind and the outcome."""
    kind = rng.choice(list(VARIANTS))
    data = VARIANTS[kind]
    if rng.random() < 0.1:
        other = rng.choice(list(VARIANTS.values()))
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    return kind, decode(mutate(data, random_edits(rng, NUMBERS, len(data))))


def try_mutant(rng: random.Random) -> tuple[str, str]:
    """Decode one mutated image of a format as a decode process does, under the service's own limits on pixels."""
    name = rng.choice(SETTINGS.image_formats)
    data = VARIANTS[rng.choice([kind for kind in VARIANTS if kind.startswith(name)])]
    reply = Reply.unpack(work(JOB, mutate(data, random_edits(rng, NUMBERS, len(data))), LIMITS))
    if reply.kind != DECODED:
        return name, ERRORS[reply.kind - 1].__name__
    assert len(reply.payload) == 3 * SIZE[0] * SIZE[1]
    return name, "image"


def try_body(rng: random.Random) -> tuple[str, str]:
    """Parse one mutated body. Return its kind and the outcome."""
    kind = rng.choice(list(BODIES))
    content_type, body = BODIES[kind][0].encode(), BODIES[kind][1]
    if rng.random() < 0.2:
        content_type = mutate(content_type, random_edits(rng, TEXT, len(content_type))[:2])
    return kind, parse(content_type, mutate(body, random_edits(rng, TEXT, len(body))))


def try_v2(rng: random.Random) -> tuple[str, str]:
    """Parse one mutated body of the protocol v2, with the length of its JSON or another. Return kind and outcome."""
    kind = rng.choice(list(V2_BODIES))
    length, body = V2_BODIES[kind]
    if rng.random() < 0.3:
        length = rng.randrange(2 * len(body))
    return kind, parse_v2(length, mutate(body, random_edits(rng, TEXT, len(body))))


TARGETS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "images": try_image,
    "mutants": try_mutant,
    "bodies": try_body,
    "v2": try_v2,
}


def fuzz(target: str, count: int, seed: int) -> Findings:
    """Try `count` inputs of a target, a chunk a process."""
    findings = Findings()
    for first in range(0, count, CHUNK):
        findings.add(watched(target, first, min(first + CHUNK, count), seed))
    return findings


def watched(target: str, first: int, stop: int, seed: int) -> Findings:
    """Try the inputs from `first` to `stop` in a child; go on behind one that ends or hangs it."""
    context = multiprocessing.get_context("spawn")
    findings = Findings()
    while first < stop:
        ours, theirs = context.Pipe(duplex=False)
        current: Any = context.Value("q", NOT_BEGUN)
        child = context.Process(target=try_all, args=(target, first, stop, seed, current, theirs), daemon=True)
        child.start()
        theirs.close()
        found = result_of(ours, current)
        if found is not None:
            findings.add(found)
            child.join()
            return findings
        hung = child.is_alive()
        child.kill()
        child.join()
        if current.value == NOT_BEGUN:
            raise RuntimeError("a process could not be started; its own message stands above")
        what = f"took more than {INPUT_TIMEOUT_S:g} s" if hung else f"ended the process with {child.exitcode}"
        findings.surprises.append(f"{target}, input {current.value} of seed {seed}: {what}")
        first = current.value + 1
    return findings


def result_of(pipe: Connection, current: Any) -> Findings | None:
    """Wait for a child's findings; None where it died, or stood still for too long."""
    last = None
    while last != current.value:
        last = current.value
        until = time.monotonic() + INPUT_TIMEOUT_S
        while time.monotonic() < until and last == current.value:
            if pipe.poll(0.2):
                try:
                    found: Findings = pipe.recv()
                except EOFError:
                    return None
                return found
    return None


def try_all(target: str, first: int, stop: int, seed: int, current: Any, pipe: Connection) -> None:
    """Body of a child."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    # Pillow warns of odd metadata, and libtiff writes to stderr by itself.
    warnings.simplefilter("ignore")
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    findings = Findings()
    for number in range(first, stop):
        current.value = number
        try_one(target, number, seed, findings)
    findings.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    pipe.send(findings)


def try_one(target: str, number: int, seed: int, findings: Findings) -> None:
    """Try one input, made from seed and number."""
    rng = random.Random(f"{seed}/{number}")
    begun = time.process_time()
    try:
        kind, name = TARGETS[target](rng)
    except BaseException as error:  # whatever it is, it would have been a 500
        kind, name = "?", "BROKEN"
        if len(findings.surprises) < SHOWN:
            findings.surprises.append(f"{target}, input {number} of seed {seed}: {error!r}")
    findings.outcomes[kind, name] += 1
    seconds = time.process_time() - begun
    findings.slowest = max(findings.slowest, (seconds, number, kind))
    if seconds > MAX_CPU_S:
        findings.surprises.append(f"{target}, input {number} of seed {seed}: took {seconds:.1f} s of CPU time")
