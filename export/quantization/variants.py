"""Building variants of an exported model: try, measure, keep or say why not."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from export.errors import GateError
from export.graph.to_onnx import serialize
from export.graph.trained import Images, Logits
from export.parity import compare_with_torch, largest_difference, warm_engine
from export.quantization.gate import (
    TIMED_BATCHES,
    Pictures,
    VariantPrecision,
    describe,
    gate_engine,
    graphs,
    provider_for,
    too_few,
    variant_metadata,
    why_refused,
)
from service.artifact import MODEL_FILE, MODEL_FILES, Golden, ModelMetadata, VariantGate, to_props
from service.engine import EngineError, ProviderChoice


@dataclass(frozen=True)
class Base:
    """What variants are made of.

    Attributes:
        graph: the float32 graph, without metadata.
        metadata: of the float32 file.
        reference: torch in float32: uint8 [N, H, W, 3] -> float32 [N, C].
        golden: pictures and torch's logits for them.
        calibration: pictures that scales are chosen by, uint8 [N, H, W, 3].
        pictures: of the gates; None for random weights, which no picture can judge.
        max_batch: largest batch in pictures.
        untimed: write a variant although its speed can't be measured here.
    """

    graph: ModelProto
    metadata: ModelMetadata
    reference: Callable[[Images], Logits]
    golden: Golden
    calibration: Images
    pictures: Pictures | None
    max_batch: int
    untimed: bool


@dataclass(frozen=True)
class Variant:
    """A variant in memory, past its gate.

    Attributes:
        precision: of the file.
        model: the file.
        metadata: of the file.
        words: what it is.
    """

    precision: VariantPrecision
    model: bytes
    metadata: ModelMetadata
    words: str


def build_variants(base: Base, wanted: Sequence[VariantPrecision]) -> list[Variant]:
    """Build the wanted variants that pass their gates; prints a sentence for each file that was tried."""
    found = (build_variant(base, precision) for precision in wanted)
    return [variant for variant in found if variant is not None]


def build_variant(base: Base, precision: VariantPrecision) -> Variant | None:
    """Take the first graph of a precision that passes its gate; None where none does, or none could be timed."""
    provider, untimed = provider_for(precision)
    name = MODEL_FILES[precision]
    if untimed is not None and not base.untimed:
        print(
            f"{name}: not written, since its speed can't be measured here: {untimed}. --untimed writes it unmeasured."
        )
        return None
    few = None if base.pictures is None else too_few(len(base.pictures.images), base.pictures.split)
    if few is not None:  # before the search, which would find nothing
        print(f"{name}: not written: {few}.")
        return None
    for words, graph in graphs(precision, base.graph, base.calibration, base.pictures):
        try:
            difference, gate = _try(base, precision, graph, provider, timed=untimed is None)
        except (EngineError, GateError) as error:
            print(f"{name}: {words}: refused: {error}.")
            continue
        reason = None if gate is None else why_refused(gate)
        if reason is None:
            print(f"{name}: {words}; {'random weights: no gate' if gate is None else describe(gate)}")
            metadata = variant_metadata(base.metadata, precision, difference, gate)
            return Variant(precision, serialize(graph, to_props(metadata)), metadata, words)
        print(f"{name}: {words}: refused: {reason}.")
    print(f"{name}: not written, since no form of it passed.")
    return None


def _try(
    base: Base, precision: VariantPrecision, graph: ModelProto, provider: ProviderChoice, *, timed: bool
) -> tuple[float, VariantGate | None]:
    """Measure a graph: the largest difference of a logit of golden and edge pictures, and its gate.

    Raises:
        GateError: a logit is no number.
    """
    draft = variant_metadata(base.metadata, precision, 0.0, None)
    with tempfile.TemporaryDirectory() as folder:
        float32, path = Path(folder) / MODEL_FILE, Path(folder) / MODEL_FILES[precision]
        float32.write_bytes(serialize(base.graph, to_props(base.metadata)))
        path.write_bytes(serialize(graph, to_props(draft)))
        with warm_engine(path, provider, max(base.max_batch, *TIMED_BATCHES)) as engine:
            difference = largest_difference(compare_with_torch(engine, base.reference, base.golden, math.inf))
            if not math.isfinite(difference):
                raise GateError("some of its logits are no numbers")
            if base.pictures is None:
                return difference, None
            return difference, gate_engine(float32, engine, base.pictures, timed)
