"""Opens onnxruntime sessions: resolves and asserts the provider, and checks the graph against the contract."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from service.engine.cpus import threads_within_limits
from service.engine.cuda_probe import CUDA, why_no_cuda
from service.engine.metadata import (
    INPUT_NAME,
    MODEL_FILES,
    ArtifactError,
    ModelMetadata,
    Precision,
    from_props,
)

logger = logging.getLogger(__name__)

# onnxruntime prints raw lines to stderr. By default only errors, as of a provider that can't be loaded; sessions print
# fatal errors alone, since theirs are raised as exceptions.
ort.set_default_logger_severity(3)
SILENT = 4

Provider = Literal["cpu", "cuda", "tensorrt"]
ProviderChoice = Literal["auto", "cpu", "cuda", "tensorrt"]

EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
}

PrecisionChoice = Literal["auto", "float32", "float16", "int8"]

# A folder holds a variant only if it passed its gate and was faster on its provider.
PREFERRED: dict[Provider, tuple[Precision, ...]] = {
    "cpu": ("int8", "float32"),
    "cuda": ("float16", "float32"),
    "tensorrt": ("float16", "float32"),
}


class EngineError(Exception):
    """A model can't be loaded or run. The message says which, why, and what would be right."""


@dataclass(frozen=True)
class SessionSpec:
    """How a session is to be opened.

    Attributes:
        provider: already resolved, see `resolve_provider`.
        device_id: index of the GPU; ignored on the CPU.
        intra_op_threads: threads of one run on the CPU; 0: one a physical core that this process may use.
        max_batch_size: the largest batch that will run.
        gpu_memory_limit_bytes: ceiling of onnxruntime's arena on the GPU; None: no ceiling.
        cuda_graphs: whether runs will be captured as CUDA graphs.
    """

    provider: Provider
    device_id: int = 0
    intra_op_threads: int = 0
    max_batch_size: int = 32
    gpu_memory_limit_bytes: int | None = None
    cuda_graphs: bool = False


def resolve_provider(choice: ProviderChoice, device_id: int = 0) -> Provider:
    """Return the provider that will run: "auto" takes CUDA if it works, else the CPU, and logs the choice.

    Raises:
        EngineError: "cuda" or "tensorrt" was asked for and can't run here; it is never replaced silently.
    """
    if choice == "cpu":
        return "cpu"
    reason = why_no_cuda(device_id)
    if choice == "auto":
        if reason is None:
            logger.info("provider auto: CUDA device %d is there and will be used", device_id)
            return "cuda"
        logger.info("provider auto: the CPU will be used, since %s", reason)
        return "cpu"
    if reason is None and EXECUTION_PROVIDERS[choice] not in ort.get_available_providers():
        reason = "this build of onnxruntime is without TensorRT"
    if reason is not None:
        raise EngineError(
            f"provider {choice} was asked for and can't run here: {reason.rstrip('.')}. It needs the extra 'gpu' and a "
            f"host with an NVIDIA driver and the device {device_id}; or ask for 'cpu' or 'auto'"
        )
    return choice


def choose_file(folder: Path, provider: Provider, precision: PrecisionChoice = "auto") -> Path:
    """Choose the file of a version folder that fits the provider: float16 on a GPU, int8 on a CPU, else float32.

    Raises:
        EngineError: the folder has no file of the precision that was asked for.
    """
    wanted = PREFERRED[provider] if precision == "auto" else (precision,)
    for candidate in wanted:
        if (folder / MODEL_FILES[candidate]).is_file():
            return folder / MODEL_FILES[candidate]
    names = " or ".join(MODEL_FILES[candidate] for candidate in wanted)
    raise EngineError(f"{folder}: there is no {names}, which precision {precision} on {provider} needs")


def open_session(path: Path, spec: SessionSpec) -> Any:
    """Open `path` as an onnxruntime InferenceSession on the provider of `spec`, and assert that it runs there.

    Raises:
        EngineError: the file is missing or no ONNX model, or onnxruntime took another provider.
    """
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file; it must be an ONNX model")
    try:
        path.open("rb").close()  # onnxruntime would report only the number of the error
    except OSError as error:
        raise EngineError(f"{path}: can't be read: {(error.strerror or str(error)).lower()}") from error
    try:
        # The built-in fallback would use the CPU when CUDA fails, now or in any later run.
        session = ort.InferenceSession(path, session_options(spec), provider_options(path, spec), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise EngineError(f"{path}: onnxruntime can't load this file on {spec.provider}: {error}") from error
    wanted, taken = EXECUTION_PROVIDERS[spec.provider], session.get_providers()
    if taken[0] != wanted:
        raise EngineError(f"{path}: {spec.provider} was asked for, and onnxruntime took {', '.join(taken)}")
    return session


def session_options(spec: SessionSpec) -> Any:
    """Thread settings for a server that shares its cores with an event loop."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec.intra_op_threads or threads_within_limits()
    options.log_severity_level = SILENT
    options.enable_mem_pattern = not spec.cuda_graphs  # a pattern allocates late, which breaks a capture
    # Spinning threads save a third of a small batch's time (0.65 against 0.93 ms on two cores). By default they spin
    # for 20 ms after each run, on the cores that decode images: 22 ms of CPU time a run against 1.9.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def provider_options(path: Path, spec: SessionSpec) -> Sequence[tuple[str, dict[str, str]]]:
    """List execution providers with their options, the wanted one first."""
    if spec.provider == "cpu":
        return [(EXECUTION_PROVIDERS["cpu"], {})]
    cuda = {
        "device_id": str(spec.device_id),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and wastes memory
        "enable_cuda_graph": str(int(spec.cuda_graphs)),
        "use_tf32": "0",  # float32 means float32; the float16 file is for speed, and has its own gate
    }
    if spec.gpu_memory_limit_bytes is not None:
        cuda["gpu_mem_limit"] = str(spec.gpu_memory_limit_bytes)
    providers = [(EXECUTION_PROVIDERS["cuda"], cuda)]
    if spec.provider == "tensorrt":
        providers.insert(0, (EXECUTION_PROVIDERS["tensorrt"], tensorrt_options(read_metadata(path), spec)))
    return [*providers, (EXECUTION_PROVIDERS["cpu"], {})]


def tensorrt_options(metadata: ModelMetadata, spec: SessionSpec) -> dict[str, str]:
    """Set the range of shapes, so that one TensorRT engine serves all batch sizes and is built once."""
    height, width = metadata.input_size
    options = {"device_id": str(spec.device_id)}
    if metadata.precision == "float16":
        options["trt_fp16_enable"] = "1"  # needed to build an engine from a float16 graph
    for bound, batch in (("min", 1), ("opt", spec.max_batch_size), ("max", spec.max_batch_size)):
        options[f"trt_profile_{bound}_shapes"] = f"{INPUT_NAME}:{batch}x{height}x{width}x3"
    return options


def read_metadata(path: Path) -> ModelMetadata:
    """Read the metadata of an ONNX file without optimising its graph.

    Raises:
        EngineError: the file is no ONNX model.
        ArtifactError: its metadata break the contract.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, SILENT
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = ort.InferenceSession(path, options, [EXECUTION_PROVIDERS["cpu"]], enable_fallback=0)
    except Exception as error:
        raise EngineError(f"{path}: onnxruntime can't read this file: {error}") from error
    return metadata_of(session, path)


def metadata_of(session: Any, path: Path) -> ModelMetadata:
    """Read the metadata of an open session; an ArtifactError names the file."""
    try:
        return from_props(session.get_modelmeta().custom_metadata_map)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def check_graph(session: Any, metadata: ModelMetadata, path: Path) -> None:
    """Check the graph's inputs and outputs against the contract and the metadata.

    Raises:
        EngineError: names, element types or shapes differ from `images` uint8 [batch, H, W, 3], `logits` float32
            [batch, C] and, where the metadata have them, `features` float32 [batch, D] and `unfamiliarity` float32
            [batch].
    """
    height, width = metadata.input_size
    for kind, nodes, dtype, expected in (
        ("input", session.get_inputs(), "uint8", {INPUT_NAME: [height, width, 3]}),
        ("output", session.get_outputs(), "float", metadata.output_shapes),
    ):
        found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in nodes)
        wanted = ", ".join(f"{name} tensor({dtype}) {['batch', *tail]}" for name, tail in expected.items())
        if [(node.name, node.type) for node in nodes] != [(name, f"tensor({dtype})") for name in expected]:
            raise EngineError(f"{path}: the graph's only {kind} must be {wanted}, and is {found or 'missing'}")
        for node, tail in zip(nodes, expected.values(), strict=True):
            batch, *rest = node.shape or [None]
            if rest != tail or isinstance(batch, int):
                raise EngineError(f"{path}: by its metadata the {kind} must be {wanted} of any batch, and is {found}")
