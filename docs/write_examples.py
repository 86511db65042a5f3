"""Write docs/apple.png and docs/examples/five-things: test images of CIFAR-100, which nothing trains on.

    python docs/write_examples.py data/cifar-100-python

Of each class the first ones that are near-duplicates of no training image; of apples the second.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from training.data import cifar
from training.near_duplicates import near_duplicates

DOCS = Path(__file__).parent
CLASSES = ("bicycle", "orange", "sea", "sunflower", "wardrobe")
COUNT = 32


def main() -> None:
    """Write the files."""
    data = cifar.load(Path(sys.argv[1]), input_size=cifar.SIDE, validation_fraction=0.02)
    assert data.test is not None
    images = data.test.images
    distinct = ~(near_duplicates(images, data.train.images) | near_duplicates(images, data.val.images))

    def chosen(label: str) -> list[int]:
        of_class = data.test.labels == data.labels.index(label)
        return (of_class & distinct).nonzero().flatten().tolist()

    def write(index: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].numpy()).save(path, optimize=True)

    write(chosen("apple")[1], DOCS / "apple.png")  # the first one shows three
    for label in CLASSES:
        for number, index in enumerate(chosen(label)[:COUNT]):
            write(index, DOCS / "examples" / "five-things" / label / f"{number:02d}.png")


if __name__ == "__main__":
    main()
