"""Is the service as good as the model? `python -m benchmarks.served_accuracy MODEL --data DIR`.

Every test image goes as PNG over real HTTP to a service started here. Each answer's label is compared with what torch
says in float32 with the checkpoint in the version folder (or that of `--run`), and top-1 and top-5 as served with the
figures in the model's metadata (or the run's `report.json`). What ran is printed. A float32 file must give the same:
exit status 1 when a label or a figure differs. A variant is held to its gate's bounds instead, since it may differ.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import BenchmarkError, describe_run, find_model, print_run, run_command
from benchmarks.generator import Plan, Records
from benchmarks.payloads import build_requests, encode
from benchmarks.processes import run_load
from benchmarks.server import HOST, Server, parse_settings
from benchmarks.summary import error_code
from export.quantization.gate import MAX_TOP1_LOSS, MIN_LABELS_EQUAL
from service.engine.metadata import ModelMetadata
from service.engine.session import EngineError, PrecisionChoice, choose_file, read_metadata, resolve_provider
from service.repository.folder import CHECKPOINT_FILE
from training.checkpoint import CheckpointError, digest, load_model
from training.data.dataset import DataError, DataSet, Split
from training.data.load import load
from training.evaluate import predict_logits

TOP = 5
SHOWN = 10


@dataclass(frozen=True)
class Figures:
    """Accuracy on a split, as fractions, and where the figures come from."""

    top1: float
    top5: float
    source: str


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served_accuracy", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder or version folder")
    parser.add_argument("--data", type=Path, help="as of python -m training; default: CIFAR-100, downloaded to data/")
    parser.add_argument(
        "--run", type=Path, help="folder of a run, or a checkpoint (default: the one in the version folder)"
    )
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only so many images; the figures are then compared with torch's")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    return parser.parse_args()


def load_test_split(path: Path | None, metadata: ModelMetadata, limit: int | None) -> Split:
    """Load the test images at the model's size, and check that their classes are the model's.

    Raises:
        BenchmarkError: no data, no test images, or other classes.
    """
    height, width = metadata.input_size
    if height != width:
        raise BenchmarkError(f"the model takes {height} x {width} images; data sets here are square")
    try:
        data: DataSet = load(path, input_size=height)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    if data.labels != metadata.labels:
        raise BenchmarkError(f"{data.name} has other classes than the model, which was trained on {metadata.dataset}")
    if data.test is None:
        raise BenchmarkError(f"{data.name} has no test images; lay them out in a folder test/")
    return Split(data.test.images[:limit], data.test.labels[:limit])


def ask_service(
    requests: Sequence[bytes], server: Server, labels: Sequence[str], concurrency: int
) -> NDArray[np.int64]:
    """Send every request once; return the top classes of each, int64 [N, TOP], in order.

    Raises:
        BenchmarkError: a request was not answered with 200, or a label is not that of its index.
    """
    load = run_load(Plan(HOST, server.port, requests, concurrency, keep_bodies=True, timeout_s=120))
    records = load.records
    for status, failure, body in zip(records.status, records.failure, records.body, strict=True):
        if status != 200:
            raise BenchmarkError(f"an image was not classified: {error_code(status, failure, body)}")
    print(f"{len(records)} images in {load.seconds:.1f} s over HTTP", flush=True)
    return read_answers(records, labels)


def read_answers(records: Records, labels: Sequence[str]) -> NDArray[np.int64]:
    """Read the classes out of answers that may have come in any order; return int64 [N, TOP] in that of the requests.

    Raises:
        BenchmarkError: a label is not that of its index.
    """
    answers = np.zeros((len(records), min(TOP, len(labels))), dtype=np.int64)
    for number, body in zip(records.number, records.body, strict=True):
        top = json.loads(body)["predictions"][0]["top"]
        for entry in top:
            if labels[entry["index"]] != entry["label"]:
                raise BenchmarkError(f"image {number}: {entry['label']!r} is not the label of index {entry['index']}")
        answers[number] = [entry["index"] for entry in top]
    return answers


def accuracy(top: NDArray[np.int64], labels: NDArray[np.int64], source: str) -> Figures:
    """Return the shares of int64 [N, TOP] whose first, and whose any, class is that of int64 [N]."""
    hits = top == labels[:, None]
    return Figures(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), source)


def equal(a: Figures, b: Figures, n: int) -> bool:
    """Whether two figures of `n` images count the same images right, apart from the last bits of a division."""
    return all(round(x * n) == round(y * n) for x, y in ((a.top1, b.top1), (a.top5, b.top5)))


def check_checkpoint(run: Path, metadata: ModelMetadata) -> Path:
    """Return the checkpoint of a run, which must be the one that the model was exported from.

    Raises:
        BenchmarkError: there is none, or it is another.
    """
    path = run / "best.safetensors" if run.is_dir() else run
    if not path.is_file():
        raise BenchmarkError(f"{path}: there is no such checkpoint; --run takes a run's folder or a .safetensors file")
    if digest(path) != metadata.provenance.checkpoint_sha256:
        raise BenchmarkError(f"{path}: by its SHA-256 the model was exported from another checkpoint; export it anew")
    return path


def torch_logits(checkpoint: Path, split: Split) -> NDArray[np.float32]:
    """Return what torch says in float32 on the CPU, float32 [N, C].

    Raises:
        BenchmarkError: the checkpoint can't be used.
    """
    try:
        model, preprocess, _ = load_model(checkpoint)
    except CheckpointError as error:
        raise BenchmarkError(str(error)) from error
    logits: NDArray[np.float32] = predict_logits(model, preprocess, split).numpy()
    return logits


def reported(run: Path | None, metadata: ModelMetadata) -> Figures | None:
    """Return the test figures of the run's report, or of the model's metadata; None where neither has any.

    Raises:
        BenchmarkError: there is a run and no report in it.
    """
    if run is None:
        metrics = metadata.metrics
        return None if metrics is None or metrics.split != "test" else Figures(metrics.top1, metrics.top5, "metadata")
    path = (run if run.is_dir() else run.parent) / "report.json"
    try:
        test = json.loads(path.read_text(encoding="utf-8"))["test"]
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"{path}: must be the report of a finished run, and can't be read: {error}") from error
    return None if test is None else Figures(test["top1"], test["top5"], str(path.name))


def precision_of(settings: Mapping[str, str]) -> PrecisionChoice:
    """Read the service's setting `precision`; "auto" where it is not set."""
    choices: tuple[PrecisionChoice, ...] = get_args(PrecisionChoice)
    chosen = settings.get("precision", "auto")
    for choice in choices:
        if chosen == choice:
            return choice
    raise BenchmarkError(f"--setting precision={chosen}: must be one of {', '.join(choices)}")


def compare_labels(served: NDArray[np.int64], logits: NDArray[np.float32]) -> int:
    """Print how many of int64 [N] differ from torch's, and of the first ones how close torch's decision was."""
    differing = np.flatnonzero(served != logits.argmax(axis=1))
    print(f"labels that differ from torch's: {len(differing)} of {len(served)}")
    for number in differing[:SHOWN].tolist():
        row = logits[number]
        margin = row.max() - row[served[number]]
        print(f"  image {number}: served {served[number]}, torch {row.argmax()} by {margin:.3g} of a logit")
    return len(differing)


def compare_figures(served: Figures, other: Figures, n: int, *, exact: bool) -> bool:
    """Print both and whether they are equal; without `exact`, a top-1 that the gate of variants lets pass is good."""
    same = equal(served, other, n)
    for figures in (served, other):
        print(f"top-1 {figures.top1:.4%}  top-5 {figures.top5:.4%}  {figures.source}")
    print("equal" if same else "NOT equal")
    return same or (not exact and other.top1 - served.top1 <= MAX_TOP1_LOSS)


def judge(
    answers: NDArray[np.int64], split: Split, checkpoint: Path | None, report: Figures | None, *, exact: bool
) -> bool:
    """Hold what was served, int64 [N, TOP], against torch and against the report.

    Returns:
        whether nothing differs; where `exact` is not asked for, whether what differs is within the gate of variants.
    """
    labels = split.labels.numpy()
    served = accuracy(answers, labels, "as served")
    good = True
    if checkpoint is not None:
        logits = torch_logits(checkpoint, split)
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
        differ = compare_labels(answers[:, 0], logits)
        good &= differ <= (0 if exact else (1 - MIN_LABELS_EQUAL) * len(split))
        good &= compare_figures(served, accuracy(ranked, labels, "torch, float32"), len(split), exact=exact)
    if report is not None:
        good &= compare_figures(served, report, len(split), exact=exact)
    return good


def main() -> int:
    """Ask, compare, print; 1 when more differs than may."""
    args = parse_arguments()
    model, settings = find_model(args.model), parse_settings(args.setting)
    file = choose_file(model.path, resolve_provider("auto"), precision_of(settings))
    metadata = read_metadata(file)
    shipped = model.path / CHECKPOINT_FILE
    run = args.run or (shipped if shipped.is_file() else None)
    checkpoint = check_checkpoint(run, metadata) if run else None
    report = None if args.limit else reported(args.run, metadata)
    if checkpoint is None and report is None:
        raise BenchmarkError("nothing to compare with: give --run, or a model whose metadata have test figures")
    split = load_test_split(args.data, metadata, args.limit)
    print_run(
        describe_run() | {"model": f"{metadata.name}, version {model.version}, {file.name}, {metadata.precision}"}
    )
    images = [encode(pixels, "png", str(number)) for number, pixels in enumerate(split.images.numpy())]
    requests = build_requests(images, "raw", host=HOST, path=f"/predict?top_k={min(TOP, len(metadata.labels))}")
    with Server(model, settings) as server:
        answers = ask_service(requests, server, metadata.labels, args.concurrency)
    return 0 if judge(answers, split, checkpoint, report, exact=metadata.precision == "float32") else 1


if __name__ == "__main__":
    run_command(main, EngineError)
