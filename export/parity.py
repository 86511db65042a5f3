"""Parity: the logits of the model that will serve, run by the service's own engine, against torch in float32.

Shape letters: N images of a batch, H and W the input size in pixels, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.errors import ExportError, GateError
from export.graph.trained import Images, Logits
from service.engine.onnx_engine import Engine, OnnxEngine
from service.engine.session import EngineError, ProviderChoice
from service.repository.folder import GOLDEN_FILE, Golden
from service.repository.golden_check import replay_golden

# Rounding in float32 changes the logits of the reference preset by 4e-6; a larger difference is another function.
FLOAT32_TOLERANCE = 1e-3
NOISE_SEED = 0

TABLE_HEAD = f"{'images':<16} {'n':>6} {'largest difference':>20} {'labels differ':>15}"


@dataclass(frozen=True)
class Comparison:
    """The difference between the engine's logits and the expected ones.

    Attributes:
        name: of the images.
        n: how many.
        max_abs_difference: largest absolute difference of a logit.
        labels_differ: images whose most likely class differs, not counting those whose two largest expected logits are
            within the tolerance of each other.
        tolerance: largest difference allowed.
    """

    name: str
    n: int
    max_abs_difference: float
    labels_differ: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether differences are within the tolerance; NaN is not."""
        return self.max_abs_difference <= self.tolerance and self.labels_differ == 0

    def __str__(self) -> str:
        verdict = "" if self.passed else f"   over the tolerance of {self.tolerance:.0e}"
        return f"{self.name:<16} {self.n:>6} {self.max_abs_difference:>20.2e} {self.labels_differ:>15}{verdict}"


def compare(name: str, expected: Logits, actual: Logits, tolerance: float) -> Comparison:
    """Compare float32 [N, C] with float32 [N, C]."""
    top2 = np.sort(expected, axis=1)[:, -2:]
    clear = top2[:, 1] - top2[:, 0] > tolerance
    differ = expected.argmax(axis=1) != actual.argmax(axis=1)
    largest = float(np.abs(expected - actual).max())
    return Comparison(name, len(expected), largest, int(np.count_nonzero(differ & clear)), tolerance)


def edge_batches(input_size: tuple[int, int], max_batch: int) -> Iterator[tuple[str, Images]]:
    """Yield black, white and noise images, uint8 [N, H, W, 3], in batches of 1, 2, 3 and `max_batch`."""
    rng = np.random.default_rng(NOISE_SEED)
    for size in sorted({1, 2, 3, max_batch}):
        if size > max_batch:
            continue
        shape = (size, *input_size, 3)
        yield f"black x {size}", np.zeros(shape, dtype=np.uint8)
        yield f"white x {size}", np.full(shape, 255, dtype=np.uint8)
        yield f"noise x {size}", rng.integers(0, 256, shape, dtype=np.uint8)


@contextmanager
def warm_engine(path: Path, provider: ProviderChoice, max_batch: int) -> Iterator[OnnxEngine]:
    """Open a file as the service does, with its warm-up, which captures a GPU's graphs or finds that it can't.

    Args:
        path: the .onnx file.
        provider: where it runs.
        max_batch: largest batch, in images.

    Raises:
        EngineError: as `OnnxEngine`.
    """
    with closing(OnnxEngine(path, provider=provider, max_batch_size=max_batch)) as engine:
        engine.warm_up()
        yield engine


def run_all(engine: Engine, images: Images) -> Logits:
    """Run uint8 [N, H, W, 3] of any N in batches as large as the engine allows; returns float32 [N, C]."""
    step = engine.max_batch_size
    return np.concatenate([engine.run(images[start : start + step]) for start in range(0, len(images), step)])


def compare_golden(engine: Engine, golden: Golden, tolerance: float) -> Comparison:
    """Compare the engine with the golden logits.

    Raises:
        ExportError: the golden images have another size, or their logits other classes.
    """
    expected = ((*engine.metadata.input_size, 3), len(engine.metadata.labels))
    if (golden.images.shape[1:], golden.logits.shape[1]) != expected:
        raise ExportError(f"{GOLDEN_FILE} holds images of another size, or logits of other classes, than the model.")
    return compare("golden", golden.logits, run_all(engine, golden.images), tolerance)


def compare_with_torch(
    engine: Engine, reference: Callable[[Images], Logits], golden: Golden, tolerance: float
) -> list[Comparison]:
    """Compare the engine with torch, on golden images and edge batches.

    Args:
        engine: what will serve.
        reference: torch in float32: uint8 [N, H, W, 3] -> float32 [N, C].
        golden: golden images and torch's logits for them.
        tolerance: largest absolute difference allowed.

    Raises:
        ExportError: as `compare_golden`.
    """
    comparisons = [compare_golden(engine, golden, tolerance)]
    for name, images in edge_batches(engine.metadata.input_size, engine.max_batch_size):
        comparisons.append(compare(name, reference(images), engine.run(images), tolerance))
    return comparisons


def compare_with_itself(engine: Engine, tolerance: float) -> list[Comparison]:
    """Compare each edge batch with its images one by one: the logits of an image must not depend on its batch."""
    comparisons = []
    for name, images in edge_batches(engine.metadata.input_size, engine.max_batch_size):
        alone = np.concatenate([engine.run(images[i : i + 1]) for i in range(len(images))])
        comparisons.append(compare(f"{name} alone", alone, engine.run(images), tolerance))
    return comparisons


def require_unfamiliarity(engine: Engine, golden: Golden, tolerance: float) -> None:
    """Require the unfamiliarity of torch's features on the golden images, where the model has one.

    Args:
        engine: what will serve.
        golden: of the same size as the model's input.
        tolerance: largest relative difference allowed.

    Raises:
        GateError: it differs.
        ExportError: the golden images have none.
    """
    if engine.metadata.unfamiliarity is None:
        return
    try:
        ratio = replay_golden(engine, golden).score_ratio
    except EngineError as error:
        raise ExportError(f"{GOLDEN_FILE}: {error}.") from error
    if not ratio <= tolerance:  # so that NaN fails
        raise GateError(
            f"the gate refuses the output unfamiliarity: on golden images it differs from that of torch by up to "
            f"{ratio:.1e} of it; allowed are {tolerance:.0e}."
        )


def max_difference(comparisons: Sequence[Comparison]) -> float:
    """Return the largest difference of a logit; NaN if one is."""
    return max((c.max_abs_difference for c in comparisons), key=lambda value: (np.isnan(value), value))


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return one clause: the largest difference and how many labels differ."""
    labels, images = sum(c.labels_differ for c in comparisons), sum(c.n for c in comparisons)
    return f"largest difference {max_difference(comparisons):.2e}, {labels} of {images} labels differ"


def require(comparisons: Sequence[Comparison]) -> None:
    """Require that all comparisons passed.

    Raises:
        GateError: names those that did not.
    """
    failed = [c.name for c in comparisons if not c.passed]
    if failed:
        tolerance = comparisons[0].tolerance
        raise GateError(
            f"the gate refuses this model on {', '.join(failed)}: {summary(comparisons)}; "
            f"allowed are {tolerance:.0e} and no label."
        )
