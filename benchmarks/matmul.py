"""The machine's rate of float32 matrix products: `python -m benchmarks.matmul`.

In a process of its own, because the number of NumPy's threads is fixed when NumPy is imported.
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks.common import ROOT

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SIZE = 2048


def measure_gflops(size: int, seconds: float) -> float:
    """Multiply two float32 [size, size] for about `seconds`; return the best rate in 10^9 operations a second."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, size, size), dtype=np.float32)
    out = np.empty_like(a)
    np.matmul(a, b, out=out)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        np.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def measure_in_subprocess(threads: int, seconds: float = 1.0, size: int = SIZE) -> float:
    """Return `measure_gflops` with so many threads; 0 leaves the choice to NumPy."""
    environment = os.environ | (dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {})
    command = [sys.executable, "-m", "benchmarks.matmul", "--size", str(size), "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    """Print the rate in 10^9 operations a second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul", description=__doc__)
    parser.add_argument("--size", type=int, default=SIZE, help="rows and columns of the square matrices")
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    print(f"{measure_gflops(args.size, args.seconds):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
