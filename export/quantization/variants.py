"""Building the variants of an exported model: try candidate graphs, run the gate, keep the first that passes."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from export.errors import GateError
from export.graph.to_onnx import serialize
from export.graph.trained import Images, Logits
from export.parity import compare_with_torch, max_difference, require_unfamiliarity, warm_engine
from export.quantization import sensitivity
from export.quantization.float16 import to_float16
from export.quantization.gate import TIMED_BATCHES, EvalSet, describe, refusal, run_gate, too_few
from export.quantization.int8 import quantize_layers, replace_layers
from service.engine.metadata import MODEL_FILE, MODEL_FILES, ModelMetadata, VariantGate, to_props
from service.engine.session import EngineError, ProviderChoice, resolve_provider
from service.repository.folder import Golden
from service.repository.golden_check import MAX_SCORE_RATIO

VariantPrecision = Literal["int8", "float16"]

PROVIDERS: dict[VariantPrecision, ProviderChoice] = {"int8": "cpu", "float16": "cuda"}
# Logits vary with the machine's integer kernels; a difference this many times larger than at export is a fault.
TOLERANCE_FACTOR = 2.0


@dataclass(frozen=True)
class Base:
    """The exported model that variants are built from.

    Attributes:
        graph: the float32 graph, without metadata.
        metadata: of the float32 file.
        reference: torch in float32: uint8 [N, H, W, 3] -> float32 [N, C].
        golden: golden images.
        calibration: images that int8 scales are chosen by, uint8 [N, H, W, 3].
        eval_set: of the gates; None for random weights, whose accuracy can't be measured.
        max_batch: largest batch, in images.
        untimed: whether to write a variant whose speed can't be measured here.
        finish: adds to a graph of any precision what stays in float32; None: nothing.
    """

    graph: ModelProto
    metadata: ModelMetadata
    reference: Callable[[Images], Logits]
    golden: Golden
    calibration: Images
    eval_set: EvalSet | None
    max_batch: int
    untimed: bool
    finish: Callable[[ModelProto], ModelProto] | None = None

    def finished(self, graph: ModelProto) -> ModelProto:
        """Return a graph as it is written."""
        return graph if self.finish is None else self.finish(graph)


@dataclass(frozen=True)
class Variant:
    """A variant in memory that passed its gate.

    Attributes:
        precision: of the file.
        content: of the file.
        metadata: of the file.
        description: what differs from float32.
    """

    precision: VariantPrecision
    content: bytes
    metadata: ModelMetadata
    description: str


def provider_for(precision: VariantPrecision) -> tuple[ProviderChoice, str | None]:
    """Return where a variant's gate runs, and why its speed can't be measured there (None: it can)."""
    try:
        return resolve_provider(PROVIDERS[precision]), None
    except EngineError as error:
        return "cpu", str(error)


def build_variants(base: Base, wanted: Sequence[VariantPrecision]) -> list[Variant]:
    """Build the wanted variants that pass their gates; prints a sentence for each candidate."""
    found = (build_variant(base, precision) for precision in wanted)
    return [variant for variant in found if variant is not None]


def build_variant(base: Base, precision: VariantPrecision) -> Variant | None:
    """Build the first candidate that passes its gate; None if none passes, or none can be timed."""
    provider, untimed = provider_for(precision)
    name = MODEL_FILES[precision]
    if untimed is not None and not base.untimed:
        print(
            f"{name}: not written, since its speed can't be measured here: {untimed}. --untimed writes it unmeasured."
        )
        return None
    few = None if base.eval_set is None else too_few(len(base.eval_set.images), base.eval_set.split)
    if few is not None:  # before the sensitivity analysis, which takes minutes
        print(f"{name}: not written: {few}.")
        return None
    for description, candidate in candidate_graphs(base, precision):
        graph = base.finished(candidate)
        try:
            difference, gate = _measure(base, precision, graph, provider, timed=untimed is None)
        except (EngineError, GateError) as error:
            print(f"{name}: {description}: refused: {error}.")
            continue
        reason = None if gate is None else refusal(gate)
        if reason is None:
            print(f"{name}: {description}; {'random weights: no gate' if gate is None else describe(gate)}")
            metadata = _metadata(base.metadata, precision, difference, gate)
            return Variant(precision, serialize(graph, to_props(metadata)), metadata, description)
        print(f"{name}: {description}: refused: {reason}.")
    print(f"{name}: not written, since no candidate passed.")
    return None


def candidate_graphs(base: Base, precision: VariantPrecision) -> Iterator[tuple[str, ModelProto]]:
    """Yield the graphs of a precision that are worth trying, the fastest first, each with a description."""
    if precision == "float16":
        yield "half precision except for the pixels and the last mean", to_float16(base.graph)
    elif base.eval_set is not None:
        margin = sensitivity.margins(base.eval_set.logits)
        yield from sensitivity.candidates(base.graph, base.calibration, margin)
    else:
        yield "all linear layers in int8", replace_layers(base.graph, quantize_layers(base.graph, base.calibration))


def _measure(
    base: Base, precision: VariantPrecision, graph: ModelProto, provider: ProviderChoice, *, timed: bool
) -> tuple[float, VariantGate | None]:
    """Return the largest difference of a logit on golden images and edge batches, and the gate's result.

    Raises:
        GateError: a logit is not finite, or the unfamiliarity is another.
        EngineError: the graph does not run.
    """
    draft = _metadata(base.metadata, precision, 0.0, None)
    with tempfile.TemporaryDirectory() as folder:
        float32, path = Path(folder) / MODEL_FILE, Path(folder) / MODEL_FILES[precision]
        float32.write_bytes(serialize(base.finished(base.graph), to_props(base.metadata)))
        path.write_bytes(serialize(graph, to_props(draft)))
        with warm_engine(path, provider, max(base.max_batch, *TIMED_BATCHES)) as engine:
            difference = max_difference(compare_with_torch(engine, base.reference, base.golden, math.inf))
            if not math.isfinite(difference):
                raise GateError("some of its logits are not finite")
            require_unfamiliarity(engine, base.golden, MAX_SCORE_RATIO)
            if base.eval_set is None:
                return difference, None
            return difference, run_gate(float32, engine, base.eval_set, timed)


def _metadata(
    metadata: ModelMetadata, precision: VariantPrecision, difference: float, gate: VariantGate | None
) -> ModelMetadata:
    """Return the float32 file's metadata with a variant's precision, tolerance and gate."""
    tolerance = max(metadata.golden_tolerance, TOLERANCE_FACTOR * difference)
    return metadata.model_copy(update={"precision": precision, "golden_tolerance": tolerance, "gate": gate})
