"""The golden check: whether an engine gives the logits that torch gave at the export."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.engine.metadata import Precision
from service.engine.onnx_engine import Engine
from service.engine.runners import default_buckets
from service.engine.session import EngineError
from service.repository.folder import Golden

FEW_IMAGES: Final = 4
MAX_SCORE_RATIO: Final = 0.1  # of a score's difference to torch's score: one of another kind differs by more
MIN_COSINE: Final = 0.99  # of features with torch's: it finds another vector; the logits find other numbers


@dataclass(frozen=True)
class GoldenReport:
    """What came of the golden images.

    Attributes:
        max_abs_difference: the largest of a logit from the golden ones.
        labels_differ: how many of the `n` images have another label.
        rate: images a second.
        score_ratio: the largest difference of an `unfamiliarity` from the golden one, as a share of that; 0 where the
            model has none.
    """

    max_abs_difference: float
    labels_differ: int
    n: int
    rate: float
    score_ratio: float = 0.0


def replay_golden(engine: Engine, golden: Golden, *, is_whole: bool = True) -> GoldenReport:
    """Run the golden images, or one batch of them, through `engine` in the largest batches, and compare the logits.

    On a GPU it also runs every other batch size, since each has its own captured graph; images repeat if too few.

    Raises:
        EngineError: the golden images have another size, or other classes, than the model.
    """
    wanted = ((*engine.metadata.input_size, 3), len(engine.metadata.labels))
    if (golden.images.shape[1:], golden.logits.shape[1]) != wanted:
        raise EngineError(
            f"golden images of shape {list(golden.images.shape[1:])} with {golden.logits.shape[1]} logits "
            f"do not fit a model of shape {list(wanted[0])} with {wanted[1]} classes"
        )
    if engine.metadata.unfamiliarity is not None and golden.unfamiliarity is None:
        raise EngineError("the golden images must have an unfamiliarity, since the model does")
    difference, ratio, wrong = 0.0, 0.0, np.zeros(len(golden), dtype=np.bool_)
    begun, ran = perf_counter(), 0
    n = len(golden) if is_whole else min(len(golden), max(FEW_IMAGES, engine.max_batch_size))
    for part in _parts(engine, n):
        ran += len(part)
        (logits, scores, _), expected = engine.run_outputs(golden.images[part]), golden.logits[part]
        difference = float(np.maximum(difference, np.abs(logits - expected).max()))  # keeps a NaN
        if scores is not None and golden.unfamiliarity is not None:
            known = golden.unfamiliarity[part]
            ratio = float(np.maximum(ratio, (np.abs(scores - known) / known).max()))
        np.logical_or.at(wrong, part, logits.argmax(axis=1) != expected.argmax(axis=1))
    rate = ran / max(perf_counter() - begun, 1e-9)
    return GoldenReport(difference, int(np.count_nonzero(wrong)), n, rate, ratio)


def _parts(engine: Engine, n: int) -> Iterator[NDArray[np.intp]]:
    begin = 0
    sizes: set[int] = set()
    while begin < n:
        end = min(n, begin + engine.max_batch_size)  # it falls when memory runs out
        yield np.arange(begin, end)
        sizes.add(end - begin)
        begin = end
    if engine.provider != "cpu":
        for size in reversed(default_buckets(engine.max_batch_size)):
            if size not in sizes and size <= engine.max_batch_size:
                yield np.arange(size) % n


def check_features(engine: Engine, golden: Golden, report: GoldenReport) -> None:
    """Check that features of one batch of golden images, where the model has any, have the direction that torch gave.

    Args:
        engine: warm.
        golden: of the version.
        report: of its logits.

    Raises:
        GoldenMismatchError: they have not.
        EngineError: the golden images have none.
    """
    if engine.metadata.feature_dim is None:
        return
    expected = golden.features
    if expected is None or expected.shape[1] != engine.metadata.feature_dim:
        raise EngineError(f"the golden images must have features of width {engine.metadata.feature_dim}")
    expected = expected[: engine.max_batch_size]
    features = engine.run_outputs(golden.images[: len(expected)], with_features=True).features
    assert features is not None
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((features * expected).sum(axis=1) / lengths).min())
    if not cosine >= MIN_COSINE:  # so that NaN fails
        raise GoldenMismatchError(
            f"the golden images give other features on {engine.provider}: the least cosine similarity is {cosine:.3g}, "
            f"and {MIN_COSINE} is allowed",
            report,
            engine.metadata.precision,
        )


class GoldenMismatchError(EngineError):
    """An engine gives other logits, features or distances than the golden ones, by more than is allowed.

    Attributes:
        report: the differences.
        precision: of the file that ran.
    """

    def __init__(self, message: str, report: GoldenReport, precision: Precision) -> None:
        super().__init__(message)
        self.report = report
        self.precision = precision


def check_golden(engine: Engine, golden: Golden, *, is_whole: bool = True) -> GoldenReport:
    """Replay the golden images, and refuse an engine that does not give what they gave.

    Args:
        engine: warm.
        golden: of the version.
        is_whole: whether all of them run; one batch is enough where another engine has run all of the same file.

    Raises:
        GoldenMismatchError: the largest difference of the logits is above `metadata.golden_tolerance`, or not a number;
            or features or unfamiliarity differ.
        EngineError: as `replay_golden` and `check_features`.
    """
    report = replay_golden(engine, golden, is_whole=is_whole)
    check_features(engine, golden, report)
    tolerance = engine.metadata.golden_tolerance
    if not report.max_abs_difference <= tolerance:  # so that NaN fails
        raise GoldenMismatchError(
            f"the golden images give other logits on {engine.provider}: the largest difference is "
            f"{report.max_abs_difference:.3g}, and {tolerance:.3g} is allowed; "
            f"{report.labels_differ} of {report.n} labels differ",
            report,
            engine.metadata.precision,
        )
    if not report.score_ratio <= MAX_SCORE_RATIO:
        raise GoldenMismatchError(
            f"the golden images give another unfamiliarity on {engine.provider}: it differs by up to "
            f"{report.score_ratio:.1%}, and {MAX_SCORE_RATIO:.0%} is allowed",
            report,
            engine.metadata.precision,
        )
    return report
