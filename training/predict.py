"""``python -m training.predict``: classify files and folders of images, and write the labels as CSV."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path

from training.checkpoint import CheckpointError
from training.classifier import Classifier
from training.cli import positive_int
from training.data.dataset import DataError
from training.data.image_files import SUFFIXES

HEAD = ("file", "rank", "label", "probability")
AT_ONCE = 64  # files


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and those below the folders that are named as images, by name.

    Raises:
        DataError: a path does not exist, or a folder has no image.
    """
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise DataError(f"{path}: has no images ({' '.join(sorted(SUFFIXES))}) in it.")
            yield from found
        elif path.exists():
            yield path
        else:
            raise DataError(f"{path}: does not exist; name image files, or folders of them.")


def predict_readable(
    classifier: Classifier, files: Sequence[Path], top_k: int
) -> Iterator[tuple[Path, int, str, float]]:
    """Rows of the readable files; of the others a sentence on stderr."""
    pixels, readable = [], []
    for file in files:
        try:
            pixels.append(classifier.read([file])[0].cpu().numpy())
            readable.append(file)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
    if pixels:
        for file, prediction in zip(readable, classifier.predict(pixels, top_k), strict=True):
            for rank, (label, probability) in enumerate(prediction, 1):
                yield file, rank, label, probability


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and predict; returns 0, 1 where some files were no readable images, 2 where nothing was done."""
    parser = argparse.ArgumentParser(
        prog="python -m training.predict",
        description="Classify images, one row of CSV for each label of each file.",
        epilog="Exit status: 0 done, 1 some files are no readable images and have no row, 2 nothing was written.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a run's folder, a model folder, or a .safetensors file"
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="an image, or a folder of images")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file to write (default: the terminal)")
    parser.add_argument("--top-k", type=positive_int, default=1, metavar="INT", help="labels of each file (default: 1)")
    args = parser.parse_args(argv)
    try:
        files = list(find_images(args.files))
        classifier = Classifier.from_pretrained(args.model)
        written = 0
        # A file's name may be of bytes that are no text, and is written as it is.
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        with (
            args.out.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            if args.out
            else nullcontext(sys.stdout)
        ) as out:
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(HEAD)
            for start in range(0, len(files), AT_ONCE):
                for file, rank, label, probability in predict_readable(
                    classifier, files[start : start + AT_ONCE], args.top_k
                ):
                    rows.writerow((file, rank, label, f"{probability:.6f}"))
                    written += rank == 1
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0 if written == len(files) else 1


if __name__ == "__main__":
    sys.exit(main())
