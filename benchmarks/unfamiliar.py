"""Which score tells an image of no class? `python -m benchmarks.unfamiliar MODEL --data DIR [--photographs DIR]`.

Compares the largest probability, the energy (Liu et al. 2020), and the Mahalanobis distance of the features to the
nearest class mean (Lee et al. 2018), on images that the model should not know: drawn ones, and tiles of photographs.
For each kind: the area under the ROC curve against validation images, and the share that still passes where 95 % of
these do (FPR at 95 %). The photographs are those that scikit-image ships and that show none of CIFAR-100's classes.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import BenchmarkError, describe_run, find_model, print_run, run_command
from export.unfamiliarity import Mahalanobis
from imaging.decoder import decode
from imaging.formats import read_header
from service.engine.onnx_engine import EngineError, OnnxEngine
from training.data.dataset import DataError
from training.data.load import load
from training.out_of_distribution import ALTERED, out_of_distribution

Images = NDArray[np.uint8]
Scores = NDArray[np.float64]

BATCH_SIZE = 32
PASSING = 0.95  # share of validation images that pass
TILES = (1, 2, 3)  # along each side of a photograph
PHOTOGRAPHS = (
    *("brick.png", "cell.png", "chelsea.png", "coins.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("logo.png", "moon.png", "page.png", "phantom.png", "retina.jpg", "text.png"),
)


def photographs(folder: Path | None, size: tuple[int, int]) -> Images:
    """Cut every photograph into tiles of the model's size, uint8 [N, H, W, 3].

    Raises:
        BenchmarkError: scikit-image is not installed, and no folder of its images is named.
    """
    if folder is None:
        found = find_spec("skimage")
        if found is None or found.origin is None:
            raise BenchmarkError("scikit-image is not installed: pip install it, or name a folder of its images")
        folder = Path(found.origin).parent / "data"
    tiles = []
    for name in PHOTOGRAPHS:
        header = read_header((folder / name).read_bytes(), max_pixels=10**8)
        for count in TILES:
            side = (size[0] * count, size[1] * count)
            whole = decode(header, size=side, crop="center", resample="bicubic")
            cut = whole.reshape(count, size[0], count, size[1], 3).swapaxes(1, 2)
            tiles.append(cut.reshape(-1, *size, 3))
    return np.concatenate(tiles)


def run(engine: OnnxEngine, images: Images) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """uint8 [N, H, W, 3] -> logits [N, C] and features [N, D]."""
    batches = (images[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE))
    logits, _, features = zip(*(engine.run_outputs(batch, with_features=True) for batch in batches), strict=True)
    return np.concatenate(logits).astype(np.float64), np.concatenate(features).astype(np.float64)


def log_sum_exp(logits: NDArray[np.float64]) -> Scores:
    """[N, C] -> [N]: minus the energy."""
    top = logits.max(axis=1)
    total: Scores = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return total


def auroc(known: Scores, foreign: Scores) -> float:
    """How often a known image has the higher score; ties count half."""
    ordered = np.sort(foreign)
    below, up_to = np.searchsorted(ordered, known, "left"), np.searchsorted(ordered, known, "right")
    return float((below + up_to).mean() / 2 / len(foreign))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unfamiliar", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder or version folder, with features")
    parser.add_argument("--data", type=Path, help="as of python -m training; default: CIFAR-100, downloaded to data/")
    parser.add_argument("--photographs", type=Path, help="folder of scikit-image's data, where it is not installed")
    parser.add_argument(
        "--train-images", type=int, default=5000, help="for the class means of the Mahalanobis distance"
    )
    parser.add_argument("--test-images", type=int, default=2000)
    return parser.parse_args()


def main() -> int:
    """Run, score, print."""
    args = parse_arguments()
    found = find_model(args.model)
    engine = OnnxEngine(found.path / "model.onnx", provider="cpu", intra_op_threads=1)
    data = load(args.data, input_size=engine.metadata.input_size[0], validation_fraction=0.02)
    assert data.test is not None
    print_run(describe_run() | {"model": f"{engine.metadata.name}, version {found.version}"})

    def spread(split: NDArray[np.generic], count: int) -> NDArray[np.generic]:
        return split[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)]

    drawn = out_of_distribution(data.val.images.numpy())
    foreign = {kind: images for kind, images in drawn.items() if kind not in ALTERED}
    foreign["photographs"] = photographs(args.photographs, engine.metadata.input_size)
    images = {
        "validation": data.val.images.numpy(),
        "test": spread(data.test.images.numpy(), args.test_images),
        **foreign,
    }
    outputs = {kind: run(engine, each) for kind, each in images.items()}
    _, features = run(engine, spread(data.train.images.numpy(), args.train_images))
    distance = Mahalanobis(features, spread(data.train.labels.numpy(), args.train_images))
    scores = {
        "max probability": {kind: np.exp(z.max(axis=1) - log_sum_exp(z)) for kind, (z, _) in outputs.items()},
        "energy": {kind: log_sum_exp(z) for kind, (z, _) in outputs.items()},
        "Mahalanobis": {kind: -distance.distance(f) for kind, (_, f) in outputs.items()},
    }
    print("| score | test flagged | " + " | ".join(f"{kind} ({len(images[kind])})" for kind in foreign) + " | mean |")
    print("|---" * (len(foreign) + 3) + "|")
    for name, by_kind in scores.items():
        known = by_kind["validation"]
        threshold = np.quantile(known, 1 - PASSING)
        cells = [(auroc(known, by_kind[kind]), float((by_kind[kind] >= threshold).mean())) for kind in foreign]
        cells.append((float(np.mean([a for a, _ in cells])), float(np.mean([f for _, f in cells]))))
        flagged = (by_kind["test"] < threshold).mean()
        print(f"| {name} | {flagged:.1%} | " + " | ".join(f"{a:.3f}, {f:.0%}" for a, f in cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, EngineError, DataError)
