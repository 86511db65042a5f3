"""Whether the answers are right: each body must hold the label that onnxruntime gives to its picture, and no other."""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.generator import Records
from benchmarks.payloads import Picture
from benchmarks.rivals.job import MAX_BATCH_SIZE, Classifier, decode

LABEL = re.compile(rb"class \d+")  # of benchmarks.tiny_model
WRONG_LABEL = "wrong_label"


def expected_labels(model: Path, pictures: Sequence[Picture]) -> list[bytes]:
    """Label each picture with onnxruntime alone."""
    classifier = Classifier(str(model))
    pixels = [decode(picture.data) for picture in pictures]
    batches = [pixels[at : at + MAX_BATCH_SIZE] for at in range(0, len(pixels), MAX_BATCH_SIZE)]
    return [classifier.labels[index].encode() for batch in batches for index in classifier.top(batch)]


def reject_wrong_labels(records: Records, expected: Sequence[bytes]) -> int:
    """Turn every answer with another label than its picture's into a failure, in place; return how many.

    Args:
        records: with bodies.
        expected: a label for each of the plan's requests.
    """
    wrong = 0
    for index, (number, status, body) in enumerate(zip(records.number, records.status, records.body, strict=True)):
        if status == 200 and LABEL.findall(body) != [expected[number % len(expected)]]:
            records.status[index], records.failure[index] = 0, WRONG_LABEL
            wrong += 1
    return wrong
