"""The load from wrk, a generator in C that takes a tenth of the Python one's CPU: https://github.com/wg/wrk."""

import json
import math
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import BenchmarkError
from benchmarks.server import HOST
from benchmarks.summary import Summary

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT_S = 30


def find_wrk() -> str:
    """Return wrk's path.

    Raises:
        BenchmarkError: PATH has none.
    """
    if (program := shutil.which("wrk")) is None:
        raise BenchmarkError("--generator wrk: PATH has no wrk; install it (apt install wrk), or use python")
    return program


def wrk_version() -> str:
    """Return the first line that wrk says of itself."""
    said = subprocess.run([find_wrk(), "-v"], capture_output=True, text=True, check=False)  # its status is 1
    return said.stdout.partition("Copyright")[0].strip()


def run_wrk(
    port: int,
    requests: Sequence[bytes],
    connections: int,
    *,
    seconds: float,
    warmup_s: float,
    server_cpu: Callable[[], float | None] = lambda: None,
) -> Summary:
    """Send whole requests in a closed loop from one thread.

    Args:
        port: the server's, on this machine.
        requests: sent in turn.
        connections: how many at once.
        seconds: that count; wrk takes whole ones, so they are rounded up, as those of the warm-up are.
        warmup_s: seconds before, on connections of their own.
        server_cpu: reads the server's CPU seconds so far.

    Raises:
        BenchmarkError: wrk is not there, or fails; with the end of its output.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(b"%d\n%b" % (len(request), request) for request in requests)
        file.flush()

        def run(duration: float) -> dict[str, float]:
            options = (f"-c{connections}", f"-d{math.ceil(duration)}s", f"--timeout={TIMEOUT_S}s", "-s", str(SCRIPT))
            command = [find_wrk(), "-t1", *options, f"http://{HOST}:{port}", "--", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            try:
                figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            except (ValueError, IndexError):
                raise BenchmarkError(f"wrk failed: {(done.stderr or done.stdout).strip()[-500:]}") from None
            return figures

        if warmup_s:
            run(warmup_s)
        before, client_before = server_cpu(), _children_cpu_seconds()
        figures = run(seconds)
        after, client_after = server_cpu(), _children_cpu_seconds()
    sent = int(figures["requests"])
    errors = {name: int(figures[name]) for name in ("status", "timeout", "socket") if figures[name]}
    answered = sent - errors.get("status", 0)
    rate = answered / figures["seconds"]
    return Summary(
        requests=sent,
        answered=answered,
        requests_per_second=rate,
        images_per_second=rate,
        latency_ms={"p50": figures["p50_ms"], "p99": figures["p99_ms"]},
        late_ms={},
        rejected_ms={},
        phases_ms={},
        errors=errors,
        server_cpu_ms=None if before is None or after is None else (after - before) * 1e3 / max(answered, 1),
        client_cpu_ms=(client_after - client_before) * 1e3 / max(sent, 1),
    )


def _children_cpu_seconds() -> float:
    """CPU time of the children that have ended: only wrk ends between two calls."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
