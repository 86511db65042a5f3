"""Several times more requests than the model can answer, in an open loop; what the service owes to those it takes in,
to those it turns away, and to its own throughput.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.generator import Plan, Records, arrival_times
from benchmarks.payloads import build_requests, generate_images
from benchmarks.processes import Load, run_load

MIN_GOODPUT = 0.9  # of the unloaded maximum
MAX_REJECTION_S = 0.05
BUSY_S = 0.01  # a generator that is later than this shares its cores with something else
TURNED_AWAY = 503
SETTLING_S = 2.0  # until the queue is full


@dataclass(frozen=True)
class Target:
    """Where the requests go, and how much it takes in.

    Attributes:
        max_batch_size: images in one run.
        max_queue_size: images accepted and not yet answered.
    """

    host: str
    port: int
    max_batch_size: int
    max_queue_size: int


@dataclass(frozen=True)
class Overload:
    """What was seen; times in seconds, rates in images a second, arrays with one entry a request.

    Attributes:
        maximum: answered when exactly as much is sent as is answered.
        offered, goodput: sent and answered with 200 under overload.
        outcomes: how many requests had each status, or failure.
        accepted, rejected: seconds from sending to the answer, float64 [n].
        overtaken: for each accepted request, answers with 200 that others got while it was in flight, int64 [n].
        rejected_meanwhile: the same for each rejected one.
        lag: how late the generator was at most.
        bound: what the last of a full queue waits: its images, and the batch that has just begun, over the maximum.
    """

    maximum: float
    offered: float
    goodput: float
    outcomes: Counter[str]
    accepted: NDArray[np.float64]
    rejected: NDArray[np.float64]
    overtaken: NDArray[np.int64]
    rejected_meanwhile: NDArray[np.int64]
    lag: float
    bound: float

    def __str__(self) -> str:
        rows = [
            f"unloaded maximum   {self.maximum:8.1f} a second",
            f"offered            {self.offered:8.1f} a second, {self.offered / self.maximum:.2f} times as many",
            f"answered           {self.goodput:8.1f} a second, {self.goodput / self.maximum:.1%} of the maximum",
            "outcomes           " + ", ".join(f"{name}: {count}" for name, count in sorted(self.outcomes.items())),
            f"accepted           {in_ms(self.accepted)}; {self.bound * 1000:.0f} ms are allowed",
            f"turned away        {in_ms(self.rejected)}; {MAX_REJECTION_S * 1000:.0f} ms are allowed",
            f"the generator was late by {self.lag * 1000:.1f} ms at most",
        ]
        return "\n".join(rows)

    def complaints(self) -> list[str]:
        """Which promises were broken."""
        found = unexpected(self.outcomes)
        if self.goodput < MIN_GOODPUT * self.maximum:
            found.append(f"only {self.goodput / self.maximum:.1%} of the unloaded maximum was answered")
        if len(self.rejected) and self.rejected.max() > MAX_REJECTION_S:
            found.append(f"a rejection took {self.rejected.max() * 1000:.0f} ms")
        if len(self.accepted) and self.accepted.max() > self.bound:
            found.append(f"an accepted request took {self.accepted.max() * 1000:.0f} ms")
        if found and self.lag > BUSY_S:
            found.append(
                f"(the generator itself was late by {self.lag * 1000:.0f} ms: measure again on an idle machine)"
            )
        return found


def unexpected(outcomes: Counter[str]) -> list[str]:
    """Outcomes that nobody deserved; and none turned away, which would be no overload."""
    found = [f"{count} requests ended with {name}" for name, count in outcomes.items() if name not in ("200", "503")]
    if not outcomes[str(TURNED_AWAY)]:
        found.append("nobody was turned away: this was no overload")
    return found


def in_ms(seconds: NDArray[np.float64]) -> str:
    """Median, 99th percentile and maximum in milliseconds."""
    if not len(seconds):
        return "none"
    median, high, most = (1000 * value for value in (np.median(seconds), np.quantile(seconds, 0.99), seconds.max()))
    return f"median {median:.1f} ms, p99 {high:.1f} ms, at most {most:.1f} ms"


def overload(target: Target, *, factor: float, seconds: float, calibration_s: float, seed: int = 0) -> Overload:
    """Measure the maximum in a closed loop that keeps two batches waiting, then send `factor` times as much."""
    images = generate_images(64, 32, "jpeg", seed)
    requests = build_requests(images, "raw", host=f"{target.host}:{target.port}")
    connections = min(4 * target.max_batch_size, target.max_queue_size)
    closed = Plan(target.host, target.port, requests, connections, seconds=1 + calibration_s)
    maximum = rate_of_answers(run_load(closed, warmup_s=1))
    if not maximum:
        raise RuntimeError("without any overload, nothing was answered with 200: this can't be overloaded")
    arrivals = arrival_times(factor * maximum, SETTLING_S + seconds, "poisson", seed)
    # Each accepted request holds a connection; the others are for those that are turned away.
    open_loop = replace(
        closed, connections=target.max_queue_size + 256, arrivals=arrivals, seconds=SETTLING_S + seconds
    )
    return evaluate(run_load(open_loop, warmup_s=SETTLING_S), maximum, target)


def rate_of_answers(load: Load) -> float:
    """Answers with 200 a second, of those that came within the window."""
    ended, status = np.array(load.records.ended), np.array(load.records.status)
    return float(np.sum((status == 200) & (ended >= load.begin) & (ended < load.end)) / load.seconds)


def evaluate(load: Load, maximum: float, target: Target) -> Overload:
    """Look at the requests that were sent within the window."""
    records = load.records
    scheduled, sent, ended = (np.array(times) for times in (records.scheduled, records.sent, records.ended))
    status = np.array(records.status)
    counts = (scheduled >= load.begin) & (scheduled < load.end)
    accepted, rejected = counts & (status == 200), counts & (status == TURNED_AWAY)
    answers = np.sort(ended[status == 200])
    meanwhile = np.searchsorted(answers, ended) - np.searchsorted(answers, sent)
    return Overload(
        maximum=maximum,
        offered=float(counts.sum() / load.seconds),
        goodput=rate_of_answers(load),
        outcomes=outcomes_of(records, counts),
        accepted=(ended - sent)[accepted],
        rejected=(ended - sent)[rejected],
        overtaken=meanwhile[accepted],
        rejected_meanwhile=meanwhile[rejected],
        lag=float((sent - scheduled)[counts].max(initial=0)),
        bound=(target.max_queue_size + target.max_batch_size) / maximum,
    )


def outcomes_of(records: Records, counts: NDArray[np.bool_]) -> Counter[str]:
    """Count statuses, failures, and rejections with another code than `overloaded`."""
    outcomes: Counter[str] = Counter()
    for index in np.flatnonzero(counts):
        name = records.failure[index] or str(records.status[index])
        if records.status[index] == TURNED_AWAY and b'"overloaded"' not in records.body[index]:
            name = f"503 {records.body[index].decode()}"
        outcomes[name] += 1
    return outcomes
