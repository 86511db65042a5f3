"""An exported model in memory, which passed its gates."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from export.parity import Comparison
from export.quantization.variants import Variant
from export.source import Source
from export.unfamiliarity import Flagged
from service.engine.metadata import ModelMetadata
from service.repository.folder import Golden


@dataclass(frozen=True)
class ExportedModel:
    """A version in memory that passed its gates.

    Attributes:
        content: of the float32 file.
        golden: golden images.
        metadata: of the float32 file.
        flops: operations for one image, by name of the form; the last form is the one that serves.
        comparisons: result of the parity check.
        variants: that passed their gates.
        leakage: whether validation images may have trained an earlier run that led to this one.
        duplicates: images of each split that are training images as well, by split.
        flagged: which images the output `unfamiliarity` flags; empty where the graph has none.
    """

    content: bytes
    golden: Golden
    metadata: ModelMetadata
    flops: list[tuple[str, int]]
    comparisons: list[Comparison]
    variants: list[Variant]
    leakage: bool
    duplicates: Mapping[str, int]
    flagged: tuple[Flagged, ...] = ()


def metrics_json(source: Source, exported: ExportedModel) -> str:
    """Return the content of `metrics.json`: the run's report and epochs, operations, and the gates' results."""
    content = {
        "report": source.report.model_dump(mode="json") if source.report else None,
        "epochs": source.epochs,
        "operations_per_picture": dict(exported.flops),
        "verification": [asdict(comparison) for comparison in exported.comparisons],
        "unfamiliar": [asdict(flagged) for flagged in exported.flagged],
        "variants": {
            variant.precision: variant.metadata.model_dump(mode="json")["gate"] for variant in exported.variants
        },
    }
    return json.dumps(content, indent=2) + "\n"
