"""`--verify`: run the gates of an existing version again, on this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.errors import ExportError, GateError
from export.graph.trained import Images, Logits, TrainedModel, cached_reference
from export.parity import (
    FLOAT32_TOLERANCE,
    Comparison,
    compare_golden,
    compare_with_itself,
    compare_with_torch,
    require,
    require_unfamiliarity,
    warm_engine,
)
from export.quantization.gate import TIMED_BATCHES, EvalSet, refusal, run_gate, validation_set
from export.quantization.variants import PROVIDERS
from export.source import Source, has_changed, load_data, load_source
from service.engine.metadata import (
    MODEL_FILE,
    MODEL_FILES,
    ArtifactError,
    EvalMetrics,
    ModelMetadata,
    Precision,
    VariantGate,
)
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import EngineError, Provider, ProviderChoice, read_metadata, resolve_provider
from service.repository.folder import CHECKPOINT_FILE, GOLDEN_FILE, Golden, list_versions, load_golden
from service.repository.golden_check import MAX_SCORE_RATIO


@dataclass(frozen=True)
class Result:
    """The result for one file.

    Attributes:
        path: of the file.
        provider: where it ran.
        comparisons: of logits; empty if the file was not run.
        gate: of a variant; None for float32, or if it could not be run.
        warnings: what was not run, and why.
    """

    path: Path
    provider: Provider
    comparisons: list[Comparison]
    gate: VariantGate | None
    warnings: list[str]

    def require(self) -> None:
        """Require that everything that ran passed.

        Raises:
            GateError: says what did not.
        """
        if self.comparisons:
            require(self.comparisons)
        if self.gate is not None and (reason := refusal(self.gate)) is not None:
            raise GateError(f"{self.path.name}: {reason}.")


@dataclass(frozen=True)
class Version:
    """A version folder and what its gates need.

    Attributes:
        path: the folder.
        golden: golden images.
        reference: torch in float32: uint8 [N, H, W, 3] -> float32 [N, C]; None without a checkpoint.
        eval_set: of the variants' gates; None if not available.
        warnings: what is not available, and why.
    """

    path: Path
    golden: Golden
    reference: Callable[[Images], Logits] | None
    eval_set: EvalSet | None
    warnings: list[str]


def verify(folder: Path, choice: ProviderChoice, max_batch: int, data: Path | None) -> list[Result]:
    """Run all gates that can be run on this machine.

    Args:
        folder: a version folder, or a model folder, of which the highest version is taken.
        choice: where to run.
        max_batch: largest batch, in images.
        data: path of the data set, for the variants' gates; None: that in training.

    Raises:
        ExportError: there is no model, or it can't be loaded or run there.
    """
    path = version_folder(folder)
    present: list[Precision] = [precision for precision, name in MODEL_FILES.items() if (path / name).is_file()]
    try:
        provider = resolve_provider(choice)
        golden = load_golden(path / GOLDEN_FILE)
        files = {path / MODEL_FILES[precision]: read_metadata(path / MODEL_FILES[precision]) for precision in present}
        version = _load(path, golden, files, data, has_variants=present != ["float32"])
        return [_verify_file(version, precision, provider, max_batch) for precision in present]
    except (ArtifactError, EngineError) as error:
        raise ExportError(str(error)) from error


def version_folder(folder: Path) -> Path:
    """Return `folder` if it is a version, else the highest version in it.

    Raises:
        ExportError: it is neither a version folder nor a model folder.
    """
    if any((folder / name).is_file() for name in MODEL_FILES.values()):
        return folder
    versions = list_versions(folder)
    if not versions:
        raise ExportError(
            f"{folder}: holds no model and no version of one; name a folder that `python -m export --out` wrote."
        )
    return versions[-1].path


def _check_metadata(path: Path, metadata: ModelMetadata, source: Source) -> None:
    """Compare a file's metadata with the checkpoint beside it.

    Raises:
        ExportError: the file is of another checkpoint; GateError: its metadata differ.
    """
    if source.checkpoint_sha256 != metadata.provenance.checkpoint_sha256:
        raise ExportError(f"{path}: by its SHA-256 the model was exported from another checkpoint.")
    size = source.run.model.input_size
    expected: dict[str, object] = {
        "labels": source.run.labels,
        "input_size": (size, size),
        "dataset": source.run.dataset,
        "preset": source.run.preset,
        "parameters": source.parameters,
        "temperature": source.temperature if source.report else metadata.temperature,
        "metrics": EvalMetrics(**source.metrics.model_dump()) if source.report and source.metrics else metadata.metrics,
    }
    wrong = [name for name, value in expected.items() if getattr(metadata, name) != value]
    if wrong:
        raise GateError(f"{path}: its metadata has another {' and another '.join(wrong)} than {CHECKPOINT_FILE}.")


def _load(
    path: Path, golden: Golden, files: Mapping[Path, ModelMetadata], data: Path | None, *, has_variants: bool
) -> Version:
    checkpoint = path / CHECKPOINT_FILE
    if not checkpoint.is_file():
        warning = (
            f"there is no {CHECKPOINT_FILE} in the folder, so nothing but the golden images was compared with torch"
        )
        return Version(path, golden, None, None, [warning])
    source = load_source(checkpoint)
    for file, metadata in files.items():
        _check_metadata(file, metadata, source)
    temperature = next(iter(files.values())).temperature
    reference = cached_reference(TrainedModel(source.preprocess, source.model, temperature).eval())
    if not has_variants:
        return Version(path, golden, reference, None, [])
    try:
        loaded = load_data(source, data)
        if has_changed(source, loaded):
            raise ExportError(
                "the data set has other images than in training, which makes a variant look too good: restore it, or "
                "name a copy by --data"
            )
    except ExportError as error:
        if data is not None:  # a user who names the data wants the labels compared
            raise
        return Version(path, golden, reference, None, [f"labels were not compared: {error}"])
    return Version(path, golden, reference, validation_set(loaded, reference), [])


def _verify_file(version: Version, precision: Precision, provider: Provider, max_batch: int) -> Result:
    path = version.path / MODEL_FILES[precision]
    if precision == "int8" and provider != "cpu":
        return Result(path, provider, [], None, ["this file is for CPUs, and was not run: use --provider cpu"])
    largest = max_batch if precision == "float32" else max(max_batch, *TIMED_BATCHES)
    with warm_engine(path, provider, largest) as engine:
        comparisons = _compare(engine, version, precision)
        if precision == "float32" or version.eval_set is None:
            return Result(path, provider, comparisons, None, version.warnings)
        timed = (version.path / MODEL_FILE).is_file() and provider == PROVIDERS[precision]
        warnings = [] if timed else [f"its speed was not measured: this file is for {PROVIDERS[precision]}"]
        gate = run_gate(version.path / MODEL_FILE, engine, version.eval_set, timed)
        return Result(path, provider, comparisons, gate, warnings)


def _compare(engine: OnnxEngine, version: Version, precision: Precision) -> list[Comparison]:
    """Compare golden images and edge batches with torch if available, and edge batches with their images one by one.

    A variant's tolerance is twice the difference at export; float32 has a fixed one, whatever its metadata say.
    """
    tolerance = FLOAT32_TOLERANCE if precision == "float32" else engine.metadata.golden_tolerance
    alone = compare_with_itself(engine, tolerance)
    require_unfamiliarity(engine, version.golden, FLOAT32_TOLERANCE if precision == "float32" else MAX_SCORE_RATIO)
    if version.reference is not None:
        return [*compare_with_torch(engine, version.reference, version.golden, tolerance), *alone]
    return [compare_golden(engine, version.golden, tolerance), *alone]
