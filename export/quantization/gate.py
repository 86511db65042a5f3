"""Variants of an exported model, each behind its own gate: int8 for CPUs, float16 for CUDA.

A variant is written only if it names the same class as torch in float32 for 99.5 % of 500 or more validation pictures,
is right as often, up to 0.3 points, and is faster than the float32 file at every measured batch size, on the provider
it is for.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export.errors import GateError
from export.graph.trained import Images, Logits
from export.parity import run_all, warm_engine
from export.quantization import sensitivity
from export.quantization.float16 import to_float16
from export.quantization.int8 import quantise
from service.artifact import ModelMetadata, VariantGate
from service.engine import Engine, EngineError, OnnxEngine, ProviderChoice, resolve_provider

Labels = NDArray[np.int64]
VariantPrecision = Literal["int8", "float16"]

PROVIDER_OF: dict[VariantPrecision, ProviderChoice] = {"int8": "cpu", "float16": "cuda"}
LEAST_EQUAL = 0.995
LEAST_PICTURES = 500  # a share of 99.5 % can't be told from 99 % on fewer
LARGEST_LOSS = 0.003  # of top-1
TIMED_BATCHES = (1, 8, 32)
TIMED_SECONDS = 2.0  # for each batch size, over both files
MORE_TIME = 4  # times as long, where the first seconds show no gain: on a busy machine the fastest run comes late
# Golden logits move with the machine's integer kernels; what is larger than this many times what was seen is a fault.
TOLERANCE_FACTOR = 2.0


@dataclass(frozen=True)
class Pictures:
    """What the gates of variants need.

    Attributes:
        split: name of the pictures.
        images: uint8 [N, H, W, 3].
        labels: int64 [N], the true classes.
        logits: float32 [N, C], of torch in float32.
    """

    split: str
    images: Images
    labels: Labels
    logits: Logits


def top1(logits: Logits, labels: Labels) -> float:
    """Share of float32 [N, C] whose largest is that of int64 [N]."""
    return float((logits.argmax(axis=1) == labels).mean())


def times_as_fast(
    base: Engine, variant: Engine, batches: Sequence[int], seconds: float = TIMED_SECONDS
) -> tuple[tuple[int, float], ...]:
    """Run two engines in turn and compare the fastest runs: (batch size, ratio) pairs.

    The fastest, because whatever else the machine does only makes a run longer.
    """
    ratios = []
    for batch in batches:
        images = np.random.default_rng(0).integers(0, 256, (batch, *base.metadata.input_size, 3), dtype=np.uint8)
        engines, best = (base, variant), [float("inf"), float("inf")]
        for engine in engines:
            engine.run(images)
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or (best[0] <= best[1] and spent < MORE_TIME * seconds):
            for index, engine in enumerate(engines):
                best[index] = min(best[index], seconds_of(engine, images))
        ratios.append((batch, best[0] / best[1]))
    return tuple(ratios)


def seconds_of(engine: Engine, images: Images) -> float:
    """Time one run of uint8 [N, H, W, 3]."""
    start = time.perf_counter()
    engine.run(images)
    return time.perf_counter() - start


def measure(engine: Engine, pictures: Pictures, speed: tuple[tuple[int, float], ...] | None) -> VariantGate:
    """Run the gate's pictures through an engine.

    Raises:
        GateError: a logit is no number.
    """
    logits = run_all(engine, pictures.images)
    if not np.isfinite(logits).all():
        raise GateError(f"some of its logits of {pictures.split} pictures are no numbers")
    return VariantGate(
        provider=engine.provider,
        split=pictures.split,
        n=len(pictures.images),
        labels_equal=float((logits.argmax(axis=1) == pictures.logits.argmax(axis=1)).mean()),
        top1=top1(logits, pictures.labels),
        top1_float32=top1(pictures.logits, pictures.labels),
        speed=speed,
    )


def describe(gate: VariantGate) -> str:
    """One sentence: labels, top-1, speed."""
    speed = "speed not measured"
    if gate.speed is not None:
        speed = "times as fast as float32: " + ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in gate.speed)
    return (
        f"{gate.labels_equal:.2%} of {gate.n:,} labels equal to float32's, top-1 {gate.top1:.2%} "
        f"({gate.top1_float32:.2%} in float32) on {gate.split}, {speed}, on {gate.provider}"
    )


def too_few(n: int, split: str) -> str | None:
    """Say that pictures are too few for a gate; None where they are enough."""
    if n >= LEAST_PICTURES:
        return None
    return f"{n} {split} pictures are too few to tell how many labels differ, {LEAST_PICTURES} are asked for"


def why_refused(gate: VariantGate) -> str | None:
    """Say what the gate does not let pass; None where it passes. A speed that was not measured is no reason."""
    if (few := too_few(gate.n, gate.split)) is not None:
        return few
    if gate.labels_equal < LEAST_EQUAL:
        return (
            f"only {gate.labels_equal:.2%} of {gate.n:,} labels are those of float32, {LEAST_EQUAL:.1%} are asked for"
        )
    if gate.top1_float32 - gate.top1 > LARGEST_LOSS + 1e-9:  # of rounding
        return (
            f"top-1 falls from {gate.top1_float32:.2%} to {gate.top1:.2%}, {LARGEST_LOSS * 100:.1f} points are allowed"
        )
    slower = [(batch, ratio) for batch, ratio in gate.speed or () if ratio <= 1]
    if slower:
        return "it is not faster than float32: " + ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in slower)
    return None


def require_variant(name: str, gate: VariantGate) -> None:
    """Refuse a variant that does not pass.

    Raises:
        GateError: says why.
    """
    reason = why_refused(gate)
    if reason is not None:
        raise GateError(f"{name}: {reason}.")


def graphs(
    precision: VariantPrecision, model: ModelProto, calibration: Images, pictures: Pictures | None
) -> Iterator[tuple[str, ModelProto]]:
    """Yield the graphs of a precision that are worth trying, the fastest first, each with what it is in words.

    Args:
        precision: of the variant.
        model: the float32 graph.
        calibration: pictures that scales are chosen by, uint8 [N, H, W, 3].
        pictures: of the gate; None for random weights, of which every product is quantised.
    """
    if precision == "float16":
        yield "half precision but for the pixels and the last mean", to_float16(model)
    elif pictures is not None:
        yield from sensitivity.candidates(model, calibration, sensitivity.leads(pictures.logits))
    else:
        yield (
            "all products with constant weights on integers",
            quantise(model, sensitivity.quantise_all(model, calibration)),
        )


def provider_for(precision: VariantPrecision) -> tuple[ProviderChoice, str | None]:
    """Return where a variant's gate runs, and why its speed can't be measured there (None: it can)."""
    try:
        return resolve_provider(PROVIDER_OF[precision]), None
    except EngineError as error:
        return "cpu", str(error)


def gate_engine(base: Path, engine: OnnxEngine, pictures: Pictures, timed: bool) -> VariantGate:
    """Measure a variant.

    Args:
        base: the float32 file; opened where the variant runs.
        engine: the variant, opened for the largest of `TIMED_BATCHES` at least.
        pictures: of the gate.
        timed: whether to measure the speed.
    """
    if not timed:
        return measure(engine, pictures, None)
    with warm_engine(base, engine.provider, engine.max_batch_size) as other:
        return measure(engine, pictures, times_as_fast(other, engine, TIMED_BATCHES))


def variant_metadata(
    metadata: ModelMetadata, precision: VariantPrecision, difference: float, gate: VariantGate | None
) -> ModelMetadata:
    """Describe a variant: the float32 file's metadata with its own precision, tolerance and gate.

    Args:
        metadata: of the float32 file.
        precision: of the variant.
        difference: largest absolute difference of a logit that was seen, of golden and edge pictures. So a batch and
            its pictures alone are no more than twice that apart.
        gate: as passed.
    """
    tolerance = max(metadata.golden_tolerance, TOLERANCE_FACTOR * difference)
    return metadata.model_copy(update={"precision": precision, "golden_tolerance": tolerance, "gate": gate})
