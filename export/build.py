"""One export from source to version folder: translate, pass the gate, write."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
from onnx import ModelProto
from pydantic import ValidationError
from torch import nn

from export.card.model_card import write_card
from export.errors import ExportError, GateError
from export.golden import data_path, has_changed, load_data, noise_golden, real_golden
from export.graph.fold import fold
from export.graph.to_onnx import serialize, to_onnx
from export.graph.trained import Images, Logits, TrainedModel, cached_reference, count_flops
from export.parity import (
    FLOAT32_TOLERANCE,
    TABLE_HEAD,
    Comparison,
    compare_with_torch,
    require,
    summary,
    warm_engine,
)
from export.promotion import check_successor, check_writable
from export.publish import new_version
from export.quantization.gate import EvalSet
from export.quantization.variants import Base, Variant, VariantPrecision, build_variants
from export.source import METRICS_FILE, Source
from export.triton import write_triton_config
from service.engine.metadata import (
    MODEL_FILE,
    MODEL_FILES,
    ArtifactError,
    EvalMetrics,
    ModelMetadata,
    Provenance,
    ResizePolicy,
    to_props,
)
from service.engine.onnx_engine import EngineError
from service.repository.folder import CHECKPOINT_FILE, GOLDEN_FILE, Golden, save_golden
from training.checkpoint import digest
from training.data.dataset import DataSet
from training.transfer import flatterers


@dataclass(frozen=True)
class Options:
    """What the command line decides.

    Attributes:
        out: the model folder.
        name: of the model; None: the folder's.
        data: where the data set is; None: where it was while training.
        golden: number of golden pictures.
        max_batch: largest batch of the gate.
        plain: keep the form that was trained.
        variants: precisions that are tried beside float32.
        variants_asked: whether somebody named them.
        untimed: write a variant although its speed can't be measured here.
        other_classes: write to a model folder whose newest version has other classes.
        even_if_worse: write to a model folder whose newest version was right more often, on the same pictures, or may
            have been, where this model's run has not ended.
    """

    out: Path
    name: str | None = None
    data: Path | None = None
    golden: int = 64
    max_batch: int = 32
    plain: bool = False
    variants: tuple[VariantPrecision, ...] = ()
    variants_asked: bool = False
    untimed: bool = False
    other_classes: bool = False
    even_if_worse: bool = False


@dataclass(frozen=True)
class Exported:
    """A version in memory, past its gate.

    Attributes:
        flattered: whether pictures that validated the run may have trained one that led to it.
        copies: validation and test pictures that are training pictures as well, see `DataSet.copies`.
    """

    model: bytes
    golden: Golden
    metadata: ModelMetadata
    operations: list[tuple[str, int]]
    comparisons: list[Comparison]
    variants: list[Variant]
    flattered: bool
    copies: Mapping[str, int]


def make_metadata(source: Source, name: str) -> ModelMetadata:
    """Gather what the service must know."""
    size = source.run.model.input_size
    return ModelMetadata(
        schema_version=1,
        name=name,
        labels=source.run.labels,
        input_size=(size, size),
        resize=ResizePolicy(),
        dataset=source.run.dataset,
        metrics=EvalMetrics(**source.metrics.model_dump()) if source.metrics else None,
        preset=source.run.preset,
        parameters=source.parameters,
        precision="float32",
        golden_tolerance=FLOAT32_TOLERANCE,
        temperature=source.temperature,
        provenance=Provenance(
            git_commit=source.git_commit,
            checkpoint_sha256=source.checkpoint_sha256,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"torch": torch.__version__, "onnx": version("onnx"), "onnxruntime": onnxruntime.__version__},
        ),
    )


def make_golden(model: nn.Module, source: Source, data: DataSet | None, count: int) -> Golden:
    """Real pictures, or noise for random weights.

    Raises:
        ExportError: a logit is no number.
    """
    size = source.run.model.input_size
    try:
        return noise_golden(model, (size, size), count) if data is None else real_golden(model, data.val, count)
    except ArtifactError as error:
        raise ExportError(
            f"{source.checkpoint}: gives logits that are no numbers ({error}); export another checkpoint of the run."
        ) from error


def make_variants(
    graph: ModelProto,
    metadata: ModelMetadata,
    reference: Callable[[Images], Logits],
    data: DataSet | None,
    golden: Golden,
    options: Options,
) -> list[Variant]:
    """Build the wanted variants that pass their gates; random weights are calibrated with the golden noise."""
    if not options.variants:
        return []
    eval_set = None
    if data is not None:
        images = data.val.images.numpy()
        eval_set = EvalSet("val", images, data.val.labels.numpy(), reference(images))
    calibration = golden.images if data is None else data.train.images.numpy()
    base = Base(graph, metadata, reference, golden, calibration, eval_set, options.max_batch, options.untimed)
    return build_variants(base, options.variants)


def pass_gate(
    model: bytes, reference: Callable[[Images], Logits], golden: Golden, options: Options
) -> list[Comparison]:
    """Run the file as the service will, on the CPU, and hold it against torch; prints the table.

    Raises:
        GateError: it answers otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        path.write_bytes(model)
        with warm_engine(path, "cpu", options.max_batch) as engine:
            comparisons = compare_with_torch(engine, reference, golden, FLOAT32_TOLERANCE)
    print(TABLE_HEAD, *comparisons, summary(comparisons), sep="\n")
    try:
        require(comparisons)
    except GateError as error:
        if options.plain:
            raise
        raise GateError(
            f"{error} Where training/model.py was changed, export/graph/fold.py has to follow; --plain exports the "
            "form that was trained, without that algebra."
        ) from error
    return comparisons


def without_what_others_would_judge(source: Source, data: DataSet | None, options: Options) -> Options:
    """Leave out the variants, and say so, where the data are no longer those of the run.

    A validation picture may be one that it was trained on then, and says too much good of a variant.

    Raises:
        ExportError: the variants were asked for by name.
    """
    if data is None or not has_changed(source, data):
        return options
    changed = "the data set has other pictures than the run was trained on"
    if options.variants and options.variants_asked:
        raise ExportError(
            f"{changed}, so it can't judge {' and '.join(options.variants)}: restore it or name a copy by --data, or "
            "export float32 alone by --variants with nothing after it."
        )
    without = f", and judges no {' and no '.join(options.variants)} file" if options.variants else ""
    print(f"note: {changed}; the golden pictures are taken from it as it is{without}.")
    return replace(options, variants=())


def folded(trained: TrainedModel, image: torch.Tensor) -> nn.Module:
    """Rewrite the trained form by exact algebra.

    Args:
        trained: the form that was trained.
        image: uint8 [1, H, W, 3], any.

    Raises:
        ExportError: the algebra does not know the model.
    """
    try:
        form = fold(trained)
        form(image)  # what was folded without a word may not fit together
        return form
    except Exception as error:  # it takes the model apart, and of one that was changed any part may be missing
        raise ExportError(
            f"export/graph/fold.py does not know this model ({type(error).__name__}: {error}); it has to follow a "
            "change of training/model.py. --plain exports the form that was trained, without its algebra."
        ) from error


def build(source: Source, options: Options) -> Exported:
    """Translate a source and pass the gate; nothing is written.

    Raises:
        ExportError: what stood in the way; GateError where the result is not the trained function.
    """
    trained = TrainedModel(source.preprocess, source.model, source.temperature).eval()
    data = None if source.checkpoint is None else load_data(source, options.data)
    options = without_what_others_would_judge(source, data, options)
    golden = make_golden(trained, source, data, options.golden)
    try:
        metadata = make_metadata(source, options.out.resolve().name if options.name is None else options.name)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model can't be described: {first['loc'][0]}: {first['msg']}.") from error
    image = torch.zeros(1, *metadata.input_size, 3, dtype=torch.uint8)
    forms: list[tuple[str, nn.Module]] = [("as trained", trained)]
    if not options.plain:
        forms.append(("folded", folded(trained, image)))
    operations = [(name, count_flops(form, image)) for name, form in forms]
    print("GFLOP a picture: " + ", ".join(f"{name} {count / 1e9:.3f}" for name, count in operations))
    graph = to_onnx(forms[-1][1], metadata.input_size)
    model = serialize(graph, to_props(metadata))
    reference = cached_reference(trained)
    try:
        comparisons = pass_gate(model, reference, golden, options)
        variants = make_variants(graph, metadata, reference, data, golden, options)
    except (ArtifactError, EngineError) as error:
        raise ExportError(f"the service's engine can't run the exported model: {error}") from error
    flattered = data is not None and bool(flatterers(source.run, data_path(source, options.data), own_val=data.own_val))
    copies = {} if data is None or has_changed(source, data) else data.copies()
    return Exported(model, golden, metadata, operations, comparisons, variants, flattered, copies)


def metrics_json(source: Source, exported: Exported) -> str:
    """Return what `metrics.json` holds: the run's report and epochs, the operations, the gates' results."""
    content = {
        "report": source.report.model_dump(mode="json") if source.report else None,
        "epochs": source.lines,
        "operations_per_picture": dict(exported.operations),
        "verification": [asdict(comparison) for comparison in exported.comparisons],
        "variants": {
            variant.precision: variant.metadata.model_dump(mode="json")["gate"] for variant in exported.variants
        },
    }
    return json.dumps(content, indent=2) + "\n"


def fill(folder: Path, source: Source, exported: Exported) -> None:
    """Write the files of a version.

    Raises:
        ExportError: the checkpoint is no longer there, or no longer the one that was exported.
    """
    (folder / MODEL_FILE).write_bytes(exported.model)
    for variant in exported.variants:
        (folder / MODEL_FILES[variant.precision]).write_bytes(variant.content)
    save_golden(folder / GOLDEN_FILE, exported.golden)
    if source.checkpoint is not None:
        if not source.checkpoint.is_file():
            raise ExportError(f"{source.checkpoint}: has gone since the export began; nothing was written.")
        shutil.copyfile(source.checkpoint, folder / CHECKPOINT_FILE)
        if digest(folder / CHECKPOINT_FILE) != source.checkpoint_sha256:
            raise ExportError(f"{source.checkpoint}: has changed since the export began, as by a run; export again.")
    card = write_card(
        source,
        exported.metadata,
        exported.operations,
        exported.comparisons,
        exported.variants,
        flattered=exported.flattered,
        copies=exported.copies,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / METRICS_FILE).write_text(metrics_json(source, exported), encoding="utf-8")
    for path in source.pictures:
        shutil.copyfile(path, folder / path.name)


def export(source: Source, options: Options) -> Path:
    """Export to the next version of the model folder; returns the version's folder.

    Raises:
        ExportError: nothing was written.
    """
    check_writable(options.out)
    allowed = {"other_classes": options.other_classes, "even_if_worse": options.even_if_worse}
    check_successor(options.out, source, **allowed)
    exported = build(source, options)
    try:
        with new_version(options.out) as (number, folder):
            check_successor(options.out, source, **allowed)  # again, of what another export may have written meanwhile
            fill(folder, source, exported)
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(f"{options.out}: can't be written to ({error.strerror}); name another --out.") from error
    if (complaint := write_triton_config(options.out, exported.metadata)) is not None:
        print(complaint)
    return options.out / str(number)
