"""One report of a GPU host, in ten minutes at most: `python -m benchmarks.gpu_report --out FOLDER`.

Driver and versions; the tests that need a GPU; the golden check of the shipped model; images a second and milliseconds
by batch size of the engine, plain, with bound buffers and with CUDA graphs, in float32 and float16, and of torch beside
it; the service over HTTP at the engine's best batch size; latency while a new version takes over. FOLDER/report.md and
FOLDER/report.csv are complete after every row, so that a stop or a part that fails costs nothing of the rest.
"""

import argparse
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import onnxruntime

from benchmarks.common import ROOT, BenchmarkError, describe_run, print_run, run_command
from benchmarks.gpu_report.page import Report
from benchmarks.gpu_report.parts import MAX_HTTP_S, Part, Run, all_parts, reason
from service.engine.cuda_probe import why_no_cuda

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PRESETS = ("reference", "photo")
MODEL = ROOT / "models" / "perceiver-cifar100"
PACKAGES = ("torch", "onnx", "pytest", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime", "triton")
GPU_FIELDS = "memory.total,power.limit,clocks.max.sm,compute_mode,mig.mode.current,utilization.gpu"


class PartTimeout(BaseException):
    """The time of a part is over. No Exception: nothing between the part and its limit may catch it."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same code without a GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it; each part has a share")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of report.md and report.csv")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder or version folder")
    parser.add_argument("--presets", nargs="*", default=PRESETS, help="measured with random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes")
    parser.add_argument("--http-seconds", type=float, default=MAX_HTTP_S, help="of a load at most")
    parser.add_argument("--parts", nargs="+", help="these alone: prepare golden tests engine torch http swap")
    args = parser.parse_args()
    known = {part.name for part in all_parts(args.presets)}
    if args.parts and (unknown := sorted(set(args.parts) - known)):
        parser.error(f"--parts: there is no {', '.join(unknown)}; choose of {', '.join(sorted(known))}")
    if min(args.batches) < 1 or args.minutes <= 0:
        parser.error("--batches must be at least 1, and --minutes above 0")
    return args


def describe_gpu() -> dict[str, str]:
    """Return what a GPU's figures depend on beside `describe_run`."""
    facts = {"onnxruntime": f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"}
    if missing := why_no_cuda():
        facts["onnxruntime on CUDA"] = f"no: {missing}"
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    facts["packages"] = ", ".join(f"{name} {number}" for name, number in found.items())
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return facts
    return facts | {"gpu state": "; ".join(done.stdout.splitlines())}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise PartTimeout in the main thread after `seconds`."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise PartTimeout

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(run: Run, parts: list[Part], seconds: float) -> int:
    """Run every part until its share of `seconds` is over; what one leaves, the next ones have.

    Returns:
        how many parts failed or ran out of time.
    """
    start, total, used, failed = time.monotonic(), sum(part.weight for part in parts), 0.0, 0
    for part in parts:
        used += part.weight
        run.deadline = start + seconds * used / total
        allowed = run.remaining_s()
        try:
            with limited(allowed):
                part.measure(run, part.model)
        except PartTimeout:
            failed += 1
            run.report.add(part.name, model=part.model or None, note=f"stopped: its {allowed:.0f} s were over")
        except Exception as error:
            failed += 1
            run.report.add(part.name, model=part.model or None, note=reason(error))
    return failed


def main() -> int:
    """Measure, and write after every row."""
    args = parse_arguments()
    begun = time.monotonic()
    about = describe_run() | describe_gpu()
    if args.device == "cuda" and "gpu" not in about:
        raise BenchmarkError("nvidia-smi names no GPU here; --device cpu runs the same without one")
    report = Report(args.out, about)
    print_run(about)
    report.write()
    parts = [part for part in all_parts(args.presets) if not args.parts or part.name in {"prepare", *args.parts}]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(report, args.device, args.model, sorted(args.batches), Path(folder), args.http_seconds)
            failed = run_parts(run, parts, 60 * args.minutes - (time.monotonic() - begun))
        minutes = (time.monotonic() - begun) / 60
        report.state = f"{len(parts)} parts in {minutes:.1f} minutes; {failed} of them failed or ran out of time."
    except (KeyboardInterrupt, SystemExit):
        report.state = f"Stopped after {(time.monotonic() - begun) / 60:.1f} minutes; what is missing was not measured."
        raise
    finally:
        report.write()
        print(f"\nwritten: {report.folder / 'report.md'}, {report.folder / 'report.csv'}", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
