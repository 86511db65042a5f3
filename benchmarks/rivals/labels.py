"""Whether the answers are right: each body must hold the label that onnxruntime gives to its image, and no other."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.generator import Records
from benchmarks.payloads import ImageFile
from benchmarks.rivals.job import MAX_BATCH_SIZE, Classifier, decode

WRONG_LABEL = "wrong_label"


@dataclass(frozen=True)
class Expected:
    """What the answers must hold.

    Attributes:
        labels: of each image, as a JSON string with its quotes.
        known: finds every label of the model in an answer.
    """

    labels: Sequence[bytes]
    known: re.Pattern[bytes]


def expect(model: Path, images: Sequence[ImageFile]) -> Expected:
    """Label each image with onnxruntime alone."""
    classifier = Classifier(str(model))
    pixels = [decode(image.data) for image in images]
    batches = [pixels[at : at + MAX_BATCH_SIZE] for at in range(0, len(pixels), MAX_BATCH_SIZE)]
    quoted = [json.dumps(label).encode() for label in classifier.labels]
    known = re.compile(b"|".join(re.escape(label) for label in quoted))
    return Expected([quoted[index] for batch in batches for index in classifier.top(batch)], known)


def reject_wrong_labels(records: Records, expected: Expected) -> int:
    """Turn every answer with another label than its image's into a failure, in place; return how many.

    Args:
        records: with bodies; of the plan's request number N the image is the Nth, counted from the first again
            behind the last.
        expected: of the images.
    """
    wrong = 0
    for index, (number, status, body) in enumerate(zip(records.number, records.status, records.body, strict=True)):
        label = expected.labels[number % len(expected.labels)]
        if status == 200 and expected.known.findall(body) != [label]:
            records.status[index], records.failure[index] = 0, WRONG_LABEL
            wrong += 1
    return wrong
