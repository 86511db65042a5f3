"""`--verify`: the gates of a version that was written before, run again on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.errors import ExportError, GateError
from export.golden import has_changed, load_data
from export.graph.trained import Images, Logits, TrainedModel, cached_reference
from export.parity import (
    FLOAT32_TOLERANCE,
    Comparison,
    compare_golden,
    compare_with_itself,
    compare_with_torch,
    require,
    warm_engine,
)
from export.quantization.gate import TIMED_BATCHES, EvalSet, refusal, run_gate
from export.quantization.variants import PROVIDERS
from export.source import Source, load_source
from service.engine.metadata import (
    MODEL_FILE,
    MODEL_FILES,
    ArtifactError,
    EvalMetrics,
    ModelMetadata,
    Precision,
    VariantGate,
)
from service.engine.onnx_engine import (
    EngineError,
    OnnxEngine,
    Provider,
    ProviderChoice,
    read_metadata,
    resolve_provider,
)
from service.repository.folder import CHECKPOINT_FILE, GOLDEN_FILE, Golden, list_versions, load_golden


@dataclass(frozen=True)
class Result:
    """What became of a file.

    Attributes:
        path: of the file.
        provider: where it ran.
        comparisons: of logits; none where the file was not run.
        gate: of a variant; None for float32, and where it could not be run.
        notes: what was not run, and why.
    """

    path: Path
    provider: Provider
    comparisons: list[Comparison]
    gate: VariantGate | None
    notes: list[str]

    def require(self) -> None:
        """Refuse what did not pass.

        Raises:
            GateError: says what.
        """
        if self.comparisons:
            require(self.comparisons)
        if self.gate is not None and (reason := refusal(self.gate)) is not None:
            raise GateError(f"{self.path.name}: {reason}.")


@dataclass(frozen=True)
class Version:
    """A version folder and what its gates need; `torch` and `eval_set` are None where they can't be had.

    Attributes:
        path: the folder.
        golden: pictures and torch's logits for them.
        torch: the training form in float32: uint8 [N, H, W, 3] -> float32 [N, C].
        eval_set: of the gates of variants.
        why: a sentence on what is missing.
    """

    path: Path
    golden: Golden
    torch: Callable[[Images], Logits] | None
    eval_set: EvalSet | None
    why: list[str]


def version_folder(folder: Path) -> Path:
    """Return a version folder: this one, or the highest version of a model folder.

    Raises:
        ExportError: it is neither.
    """
    if any((folder / name).is_file() for name in MODEL_FILES.values()):
        return folder
    versions = list_versions(folder)
    if not versions:
        raise ExportError(
            f"{folder}: holds no model and no version of one; name a folder that `python -m export --out` wrote."
        )
    return versions[-1].path


def verify(folder: Path, choice: ProviderChoice, max_batch: int, data: Path | None) -> list[Result]:
    """Run all gates again that can be run on this machine.

    Args:
        folder: a version folder, or a model folder, of which the highest version is taken.
        choice: where to run.
        max_batch: largest batch in pictures.
        data: the data set, for the gates of variants; None: where it was while training.

    Raises:
        ExportError: there is no model, it can't be loaded, or can't run there.
    """
    path = version_folder(folder)
    present: list[Precision] = [precision for precision, name in MODEL_FILES.items() if (path / name).is_file()]
    try:
        provider = resolve_provider(choice)
        golden = load_golden(path / GOLDEN_FILE)
        described = {
            path / MODEL_FILES[precision]: read_metadata(path / MODEL_FILES[precision]) for precision in present
        }
        version = _load(path, golden, described, data, wants_pictures=present != ["float32"])
        return [_verify_file(version, precision, provider, max_batch) for precision in present]
    except (ArtifactError, EngineError) as error:
        raise ExportError(str(error)) from error


def _check_described(path: Path, metadata: ModelMetadata, source: Source) -> None:
    """Refuse a file that says of itself what the checkpoint beside it does not.

    Raises:
        ExportError: it is of another checkpoint; GateError: labels, or what decides answers, are others.
    """
    if source.checkpoint_sha256 != metadata.provenance.checkpoint_sha256:
        raise ExportError(f"{path}: by its SHA-256 the model was exported from another checkpoint.")
    size = source.run.model.input_size
    true: dict[str, object] = {
        "labels": source.run.labels,
        "input_size": (size, size),
        "dataset": source.run.dataset,
        "preset": source.run.preset,
        "parameters": source.parameters,
        "temperature": source.temperature if source.report else metadata.temperature,
        "metrics": EvalMetrics(**source.metrics.model_dump()) if source.report and source.metrics else metadata.metrics,
    }
    wrong = [name for name, value in true.items() if getattr(metadata, name) != value]
    if wrong:
        raise GateError(f"{path}: its metadata has another {' and another '.join(wrong)} than {CHECKPOINT_FILE}.")


def _load(
    path: Path, golden: Golden, described: dict[Path, ModelMetadata], data: Path | None, *, wants_pictures: bool
) -> Version:
    checkpoint = path / CHECKPOINT_FILE
    if not checkpoint.is_file():
        why = f"there is no {CHECKPOINT_FILE} in the folder, so nothing was held against torch but the golden pictures"
        return Version(path, golden, None, None, [why])
    source = load_source(checkpoint)
    for file, metadata in described.items():
        _check_described(file, metadata, source)
    temperature = next(iter(described.values())).temperature
    torch = cached_reference(TrainedModel(source.preprocess, source.model, temperature).eval())
    if not wants_pictures:
        return Version(path, golden, torch, None, [])
    try:
        loaded = load_data(source, data)
        if has_changed(source, loaded):
            raise ExportError(
                "the data set has other pictures than the run was trained on, which would say too much good of a "
                "variant: restore it, or name a copy by --data"
            )
    except ExportError as error:
        if data is not None:
            raise  # who names the data wants the labels compared
        return Version(path, golden, torch, None, [f"labels were not compared: {error}"])
    images = loaded.val.images.numpy()
    return Version(path, golden, torch, EvalSet("val", images, loaded.val.labels.numpy(), torch(images)), [])


def _verify_file(version: Version, precision: Precision, provider: Provider, max_batch: int) -> Result:
    path = version.path / MODEL_FILES[precision]
    if precision == "int8" and provider != "cpu":
        return Result(path, provider, [], None, ["this file is for CPUs, and was not run: use --provider cpu"])
    largest = max_batch if precision == "float32" else max(max_batch, *TIMED_BATCHES)
    with warm_engine(path, provider, largest) as engine:
        comparisons = _compare(engine, version, precision)
        if precision == "float32" or version.eval_set is None:
            return Result(path, provider, comparisons, None, version.why)
        timed = (version.path / MODEL_FILE).is_file() and provider == PROVIDERS[precision]
        notes = [] if timed else [f"its speed was not measured: this file is for {PROVIDERS[precision]}"]
        gate = run_gate(version.path / MODEL_FILE, engine, version.eval_set, timed)
        return Result(path, provider, comparisons, gate, notes)


def _compare(engine: OnnxEngine, version: Version, precision: Precision) -> list[Comparison]:
    """Golden pictures and edge batches: against torch where it is at hand, and against themselves one by one.

    A variant's tolerance is twice what its export saw; float32 has none of its own.
    """
    tolerance = FLOAT32_TOLERANCE if precision == "float32" else engine.metadata.golden_tolerance
    alone = compare_with_itself(engine, tolerance)
    if version.torch is not None:
        return [*compare_with_torch(engine, version.torch, version.golden, tolerance), *alone]
    return [compare_golden(engine, version.golden, tolerance), *alone]
