"""The gate of a variant: as accurate as float32, and faster, on the provider that it is for.

Shape letters: N images, H and W the input size in pixels, C classes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import GateError
from export.graph.trained import Images, Logits
from export.parity import run_all, warm_engine
from service.engine.metadata import VariantGate
from service.engine.onnx_engine import Engine, OnnxEngine
from training.data.dataset import DataSet

MIN_LABELS_EQUAL = 0.995  # share of labels that are torch's in float32
MIN_IMAGES = 500  # with fewer, 99.5 % can't be told from 99 %
MAX_TOP1_LOSS = 0.003
TIMED_BATCHES = (1, 8, 32)
TIMED_SECONDS = 2.0  # for each batch size, over both files
TIMED_SECONDS_FACTOR = 4  # times as long where no gain is seen at first: on a busy machine the fastest run comes late


@dataclass(frozen=True)
class EvalSet:
    """Labelled images and the reference logits for them.

    Attributes:
        split: name of the split.
        images: uint8 [N, H, W, 3].
        labels: int64 [N], the true classes.
        logits: float32 [N, C], of torch in float32.
    """

    split: str
    images: Images
    labels: NDArray[np.int64]
    logits: Logits


def validation_set(data: DataSet, reference: Callable[[Images], Logits]) -> EvalSet:
    """Return the validation images of a data set with reference logits."""
    images = data.val.images.numpy()
    return EvalSet("val", images, data.val.labels.numpy(), reference(images))


def top1(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Return the share of float32 [N, C] whose most likely class is that of int64 [N]."""
    return float((logits.argmax(axis=1) == labels).mean())


def measure_speedup(
    base: Engine, variant: Engine, batches: Sequence[int], seconds: float = TIMED_SECONDS
) -> tuple[tuple[int, float], ...]:
    """Run two engines in turn and compare their fastest runs, since other work can only slow a run down.

    Returns:
        (batch size, how many times as fast the variant is) pairs.
    """
    ratios = []
    for batch in batches:
        images = np.random.default_rng(0).integers(0, 256, (batch, *base.metadata.input_size, 3), dtype=np.uint8)
        engines, best = (base, variant), [float("inf"), float("inf")]
        for engine in engines:
            engine.run(images)
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or (
            best[0] <= best[1] and spent < TIMED_SECONDS_FACTOR * seconds
        ):
            for index, engine in enumerate(engines):
                began = time.perf_counter()
                engine.run(images)
                best[index] = min(best[index], time.perf_counter() - began)
        ratios.append((batch, best[0] / best[1]))
    return tuple(ratios)


def evaluate(engine: Engine, data: EvalSet, speed: tuple[tuple[int, float], ...] | None) -> VariantGate:
    """Run an evaluation set through an engine.

    Raises:
        GateError: a logit is not finite.
    """
    logits = run_all(engine, data.images)
    if not np.isfinite(logits).all():
        raise GateError(f"some of its logits of {data.split} images are not finite")
    return VariantGate(
        provider=engine.provider,
        split=data.split,
        n=len(data.images),
        labels_equal=top1(logits, data.logits.argmax(axis=1)),
        top1=top1(logits, data.labels),
        top1_float32=top1(data.logits, data.labels),
        speed=speed,
    )


def run_gate(base: Path, engine: OnnxEngine, data: EvalSet, timed: bool) -> VariantGate:
    """Measure accuracy and speed of a variant.

    Args:
        base: the float32 file; opened on the variant's provider.
        engine: the variant, opened for the largest of `TIMED_BATCHES` at least.
        data: of the gate.
        timed: whether to measure the speed.

    Raises:
        GateError: a logit is not finite.
        EngineError: a file does not run.
    """
    if not timed:
        return evaluate(engine, data, None)
    with warm_engine(base, engine.provider, engine.max_batch_size) as other:
        return evaluate(engine, data, measure_speedup(other, engine, TIMED_BATCHES))


def describe(gate: VariantGate) -> str:
    """Return one sentence on labels, top-1 and speed."""
    speed = "speed not measured"
    if gate.speed is not None:
        speed = "times as fast as float32: " + ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in gate.speed)
    return (
        f"{gate.labels_equal:.2%} of {gate.n:,} labels equal to float32's, top-1 {gate.top1:.2%} "
        f"({gate.top1_float32:.2%} in float32) on {gate.split}, {speed}, on {gate.provider}"
    )


def too_few(n: int, split: str) -> str | None:
    """Return why `n` images are too few for a gate; None if they are enough."""
    if n >= MIN_IMAGES:
        return None
    return f"{n} {split} images are too few to measure how many labels differ; at least {MIN_IMAGES} are needed"


def refusal(gate: VariantGate) -> str | None:
    """Return why the gate refuses; None if it passes. A speed that was not measured does not count."""
    if (few := too_few(gate.n, gate.split)) is not None:
        return few
    if gate.labels_equal < MIN_LABELS_EQUAL:
        return (
            f"only {gate.labels_equal:.2%} of {gate.n:,} labels are those of float32; "
            f"at least {MIN_LABELS_EQUAL:.1%} are needed"
        )
    if gate.top1_float32 - gate.top1 > MAX_TOP1_LOSS + 1e-9:  # for rounding
        return (
            f"top-1 falls from {gate.top1_float32:.2%} to {gate.top1:.2%}, {MAX_TOP1_LOSS * 100:.1f} points are allowed"
        )
    slower = [(batch, ratio) for batch, ratio in gate.speed or () if ratio <= 1]
    if slower:
        return "it is not faster than float32: " + ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in slower)
    return None
