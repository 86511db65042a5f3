"""One export: translate the model, run its gates, write the next version of the model folder."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from pydantic import ValidationError
from torch import nn

from export.card.model_card import write_card
from export.errors import ExportError, GateError
from export.exported import ExportedModel, metrics_json
from export.golden import make_golden
from export.graph.fold import fold
from export.graph.to_onnx import serialize, to_onnx
from export.graph.trained import Images, Logits, TrainedModel, WithFeatures, cached_reference, count_flops
from export.parity import (
    FLOAT32_TOLERANCE,
    TABLE_HEAD,
    Comparison,
    compare_with_torch,
    require,
    require_unfamiliarity,
    summary,
    warm_engine,
)
from export.promotion import check_out, check_promotion
from export.publish import new_version
from export.quantization.gate import validation_set
from export.quantization.variants import Base, Variant, VariantPrecision, build_variants
from export.source import Source, data_path, has_changed, load_data
from export.triton import write_triton_config
from export.unfamiliarity import Fit, fit_unfamiliarity, why_not
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
from service.engine.session import EngineError
from service.repository.folder import CHECKPOINT_FILE, GOLDEN_FILE, Golden, save_golden
from training.checkpoint import digest
from training.data.dataset import DataSet
from training.report_schema import METRICS_FILE
from training.seen_images import FILE as SEEN_IMAGES_FILE
from training.transfer import validation_overlaps


@dataclass(frozen=True)
class Options:
    """The settings of an export, as on the command line.

    Attributes:
        out: the model folder.
        name: of the model; None: that of the folder.
        data: path of the data set; None: that in training.
        golden: number of golden images.
        max_batch: largest batch of the parity check, in images.
        plain: export the trained form, not the folded one.
        variants: precisions to try beside float32.
        variants_asked: whether the user named them.
        untimed: write a variant although its speed can't be measured here.
        other_classes: see `check_promotion`.
        even_if_worse: see `check_promotion`.
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


def make_metadata(source: Source, name: str) -> ModelMetadata:
    """Return the metadata of the float32 file.

    Raises:
        ExportError: a value breaks the contract, such as an empty name.
    """
    size = source.run.model.input_size
    try:
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
            feature_dim=source.run.model.dim,
            provenance=Provenance(
                git_commit=source.git_commit,
                checkpoint_sha256=source.checkpoint_sha256,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                versions={"torch": torch.__version__, "onnx": version("onnx"), "onnxruntime": onnxruntime.__version__},
            ),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model's metadata are not valid: {first['loc'][0]}: {first['msg']}.") from error


def make_variants(
    graph: ModelProto,
    metadata: ModelMetadata,
    reference: Callable[[Images], Logits],
    data: DataSet | None,
    golden: Golden,
    fit: Fit | None,
    options: Options,
) -> list[Variant]:
    """Build the wanted variants that pass their gates; random weights are calibrated on the golden noise."""
    if not options.variants:
        return []
    eval_set = None if data is None else validation_set(data, reference)
    calibration = golden.images if data is None else data.train.images.numpy()
    finish = None if fit is None else fit.distance.append_to
    base = Base(graph, metadata, reference, golden, calibration, eval_set, options.max_batch, options.untimed, finish)
    return build_variants(base, options.variants)


def check_parity(
    content: bytes, reference: Callable[[Images], Logits], golden: Golden, options: Options
) -> list[Comparison]:
    """Run the file as the service does, on the CPU, and compare it with torch; prints the table.

    Raises:
        GateError: the logits differ, or the unfamiliarity.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        path.write_bytes(content)
        with warm_engine(path, "cpu", options.max_batch) as engine:
            comparisons = compare_with_torch(engine, reference, golden, FLOAT32_TOLERANCE)
            print(TABLE_HEAD, *comparisons, summary(comparisons), sep="\n")
            try:
                require(comparisons)
                require_unfamiliarity(engine, golden, FLOAT32_TOLERANCE)
            except GateError as error:
                if options.plain:
                    raise
                raise GateError(
                    f"{error} Where training/model.py was changed, export/graph/fold.py has to follow; --plain exports "
                    "the trained form, without that algebra."
                ) from error
    return comparisons


def drop_variants(options: Options) -> Options:
    """Drop the variants, with a warning, since the data differ from the run's.

    Validation images may then be training images of the run, which makes the accuracy of a variant look too good.

    Raises:
        ExportError: the user named the variants.
    """
    changed = "the data set has other images than in training"
    if options.variants and options.variants_asked:
        raise ExportError(
            f"{changed}, so it can't judge {' and '.join(options.variants)}: restore it, name a copy by --data, or "
            "export float32 alone by --variants without values."
        )
    dropped = f", and no {' or '.join(options.variants)} file is tried" if options.variants else ""
    print(f"warning: {changed}; the golden images are taken from it{dropped}.")
    return replace(options, variants=())


def folded(trained: TrainedModel, image: torch.Tensor) -> nn.Module:
    """Fold the trained form.

    Args:
        trained: the trained form.
        image: uint8 [1, H, W, 3], any.

    Raises:
        ExportError: the algebra does not know the model.
    """
    try:
        form = fold(trained)
        form(image)  # parts that were folded without an error may not fit together
        return form
    except Exception as error:  # of any type: any part of a changed model may be missing
        raise ExportError(
            f"export/graph/fold.py does not know this model ({type(error).__name__}: {error}); it has to follow a "
            "change of training/model.py. --plain exports the trained form, without its algebra."
        ) from error


def unfamiliarity(content: bytes, data: DataSet | None, *, is_changed: bool) -> Fit | None:
    """Fit the output `unfamiliarity`; prints why where it can't be. Arguments as of `fit_unfamiliarity`."""
    fit, reason = None, why_not(data, is_changed=is_changed)
    if data is not None and reason is None:
        try:
            fit = fit_unfamiliarity(content, data)
        except ExportError as error:
            reason = str(error)
    if fit is None:
        print(f"no output unfamiliarity, so no answer says that an image is unlike the training images: {reason}.")
        return None
    shares = ", ".join(f"{each.share:.1%} of {each.n:,} {each.images}" for each in fit.flagged)
    print(f"unfamiliar above {fit.metadata.threshold:.4g}: {shares} images")
    return fit


def build(source: Source, options: Options) -> ExportedModel:
    """Translate a model and run its gates; writes nothing.

    Raises:
        ExportError: the model can't be exported; GateError if the result differs from the trained model.
    """
    trained = TrainedModel(source.preprocess, source.model, source.temperature).eval()
    data = None if source.checkpoint is None else load_data(source, options.data)
    is_changed = data is not None and has_changed(source, data)
    options = drop_variants(options) if is_changed else options
    golden = make_golden(trained, source, data, options.golden)
    metadata = make_metadata(source, options.out.resolve().name if options.name is None else options.name)
    image = torch.zeros(1, *metadata.input_size, 3, dtype=torch.uint8)
    forms: list[tuple[str, nn.Module]] = [("as trained", trained)]
    if not options.plain:
        forms.append(("folded", folded(trained, image)))
    flops = [(name, count_flops(form, image)) for name, form in forms]
    print("GFLOP an image: " + ", ".join(f"{name} {count / 1e9:.3f}" for name, count in flops))
    graph = to_onnx(WithFeatures(forms[-1][1]), metadata.input_size)
    reference = cached_reference(trained)
    try:
        fit = unfamiliarity(serialize(graph, to_props(metadata)), data, is_changed=is_changed)
        whole = graph
        if fit is not None and golden.features is not None:
            whole = fit.distance.append_to(graph)
            metadata = metadata.model_copy(update={"unfamiliarity": fit.metadata})
            scores = fit.distance.distance(golden.features).astype(np.float32)
            golden = replace(golden, unfamiliarity=scores)
        content = serialize(whole, to_props(metadata))
        comparisons = check_parity(content, reference, golden, options)
        variants = make_variants(graph, metadata, reference, data, golden, fit, options)
    except (ArtifactError, EngineError) as error:
        raise ExportError(f"the service's engine can't run the exported model: {error}") from error
    leakage = data is not None and bool(
        validation_overlaps(source.run, data_path(source, options.data), has_val=data.has_val)
    )
    duplicates = {} if data is None or is_changed else data.copies()
    flagged = () if fit is None else fit.flagged
    return ExportedModel(content, golden, metadata, flops, comparisons, variants, leakage, duplicates, flagged)


def write_version(folder: Path, source: Source, exported: ExportedModel) -> None:
    """Write the files of a version.

    Raises:
        ExportError: the checkpoint was removed or replaced since it was read.
    """
    (folder / MODEL_FILE).write_bytes(exported.content)
    for variant in exported.variants:
        (folder / MODEL_FILES[variant.precision]).write_bytes(variant.content)
    save_golden(folder / GOLDEN_FILE, exported.golden)
    if source.checkpoint is not None:
        if not source.checkpoint.is_file():
            raise ExportError(f"{source.checkpoint}: was removed during the export; nothing was written.")
        shutil.copyfile(source.checkpoint, folder / CHECKPOINT_FILE)
        if digest(folder / CHECKPOINT_FILE) != source.checkpoint_sha256:
            raise ExportError(f"{source.checkpoint}: was changed during the export, as by a run; export again.")
    (folder / "README.md").write_text(write_card(source, exported), encoding="utf-8")
    (folder / METRICS_FILE).write_text(metrics_json(source, exported), encoding="utf-8")
    if source.checkpoint is not None and (seen := source.checkpoint.with_name(SEEN_IMAGES_FILE)).is_file():
        shutil.copyfile(seen, folder / seen.name)
    for path in source.plots:
        shutil.copyfile(path, folder / path.name)


def export(source: Source, options: Options) -> Path:
    """Export to the next version of the model folder; returns the version's folder.

    Raises:
        ExportError: nothing was written.
    """
    check_out(options.out)
    allowed = {"other_classes": options.other_classes, "even_if_worse": options.even_if_worse}
    check_promotion(options.out, source, **allowed)
    exported = build(source, options)
    try:
        with new_version(options.out) as (number, folder):
            check_promotion(options.out, source, **allowed)  # another export may have written a version meanwhile
            write_version(folder, source, exported)
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(f"{options.out}: can't be written to ({error.strerror}); name another --out.") from error
    if (warning := write_triton_config(options.out, exported.metadata)) is not None:
        print(f"warning: {warning}")
    return options.out / str(number)
