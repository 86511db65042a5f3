"""Every setting of the service: its unit, its bounds, and what happens at them.

Each field is the environment variable `PERCEIVER_<NAME>` and the flag `--<name>` of `python -m service`; the flag wins.
An empty variable counts as unset. `service.cli` collects errors and finds misspelt names.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Le
from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from imaging.structure.header import Format

MIB = 1024 * 1024


def split_list(value: object) -> object:
    """Turn "a, b" from the environment or a flag into ["a", "b"]; anything else passes."""
    if not isinstance(value, str):
        return value
    items = [item.strip() for item in value.split(",") if item.strip()]
    if not items:
        raise ValueError("is set and holds nothing; leave it out, or write values with commas between them")
    return items


def split_formats(value: object) -> object:
    """Split a list of formats, in lower case or upper."""
    parts = split_list(value)
    return [part.upper() if isinstance(part, str) else part for part in parts] if isinstance(parts, list) else parts


def auto_is_0(value: object) -> object:
    """Turn "auto" into its synonym 0; anything else passes."""
    return 0 if value == "auto" else value


class Settings(BaseSettings):
    """Serve a Perceiver image classifier over HTTP. Every flag is also an environment variable; the flag wins."""

    model_config = SettingsConfigDict(
        env_prefix="PERCEIVER_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        use_attribute_docstrings=True,
    )

    model_dir: Path = Path("models/perceiver-cifar100")
    """Folder with one numbered folder per model version; the highest number serves."""
    model_version: int | None = Field(None, ge=1)
    """Serve this version and no other; newer ones are listed and not taken."""
    model_poll_s: float = Field(5.0, ge=0.1, le=3600)
    """Seconds between two polls of the model folder for a new version."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 for all of IPv4, :: for all of IPv6."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one and logs it."""
    management_port: int | None = Field(None, ge=1, le=65535)
    """TCP port of its own for /metrics, /health, /models, and /v2's statistics and repository index, which the main
    port does not serve then. With several workers each takes one of as many ports, from this one on. Unset: the main
    port has them.
    """
    workers: Annotated[int, BeforeValidator(auto_is_0)] = Field(1, ge=0, le=64)
    """Processes that share the port, each a whole service with limits of its own; one that ends is replaced. auto, or
    0: one a core where the model runs on the CPU, else 1. Linux only, unless 1.
    """

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """Where the model runs. auto takes CUDA where there is one; any other choice that is not available stops the start,
    it is never replaced silently. tensorrt wants a TensorRT 10 of your own on LD_LIBRARY_PATH (libnvinfer.so.10), and
    NVIDIA_TF32_OVERRIDE=0 for a float32 file; it has never been tried.
    """
    device_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], NoDecode, BeforeValidator(split_list)] = Field(
        (0,), min_length=1
    )
    """GPU numbers, separated by commas; each runs its own copy of the model. CUDA counts the fastest first; with
    CUDA_DEVICE_ORDER=PCI_BUS_ID, as in the image, it counts as nvidia-smi and the metrics do.
    """
    precision: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Which of a version's files runs; auto takes what is best where the model runs."""
    gpu_memory_limit_bytes: int | None = Field(None, ge=MIB)
    """Bytes of GPU memory that onnxruntime's arena may take on each device for one model version; unset: all of it.
    While a version takes over from another there are two; cuBLAS, CUDA graphs and buffers come on top.
    """
    cuda_graphs: bool = True
    """Capture CUDA graphs at warm-up: faster, and takes more GPU memory."""
    intra_op_threads: int = Field(0, ge=0, le=1024)
    """CPU threads of one run of the model; 0: one a physical core, of those that a container's limit leaves, shared
    between the engines.
    """
    cpu_engines: int = Field(0, ge=0, le=64)
    """Number of engines on the CPU; 0: one a core, at most 4, or one if intra_op_threads are given."""
    max_batch_size: int = Field(32, ge=1, le=1024)
    """Images in one run of the model at most. Larger: more throughput, more memory."""
    tune_batch_size: bool = True
    """On a CPU: measure, while the model is loaded, whether a smaller batch size than max_batch_size is faster in
    images a second of processor time, and run none that are larger, nor any that take over 0.1 s of it. Off: batches of
    up to max_batch_size.
    """
    max_queue_delay_ms: float = Field(0.0, ge=0, le=1000)
    """Milliseconds that an incomplete batch waits for more images. 0: a free model starts at once, and batches form
    while it is busy.
    """
    run_timeout_ms: int = Field(30_000, ge=10, le=3_600_000)
    """Milliseconds after which a run of the model counts as hung: the process turns unready and ends with status 1, so
    that it is started anew.
    """
    load_timeout_s: float = Field(600.0, ge=0.1, le=86_400)
    """Seconds that a model version may take to load, warm up and pass its checks; then it is refused. Building a
    TensorRT engine takes minutes.
    """

    max_queue_size: int = Field(512, ge=1, le=1_000_000)
    """Images accepted and not yet answered; above it 503 with Retry-After. At least max_images."""
    max_queue_bytes: int = Field(256 * MIB, ge=1024, le=1024 * 1024 * MIB)
    """Bytes of request bodies held in memory at once; above it 503 with Retry-After. At least max_body_bytes."""
    request_timeout_ms: int = Field(10_000, ge=1, le=600_000)
    """Milliseconds from the last byte of a request's body until its run begins; an image still queued then is not run:
    504. Clients may ask for less with X-Request-Timeout-Ms.
    """
    drain_delay_s: float = Field(0.0, ge=0, le=600)
    """Seconds after SIGTERM in which requests are still accepted while /health/ready returns 503 already, so that a
    load balancer has turned away when the drain begins: longer than its probes need to notice. 0: the drain begins at
    once.
    """
    drain_timeout_s: float = Field(30.0, ge=0, le=3600)
    """Seconds that accepted requests get to finish after SIGTERM (and drain_delay_s); then they get 503, and the
    process ends within six seconds more.
    """

    max_body_bytes: int = Field(32 * MIB, ge=1024, le=1024 * MIB)
    """Bytes of one request body; more is refused while reading: 413. At most max_queue_bytes."""
    max_pixels: int = Field(50_000_000, ge=1, le=89_000_000)
    """Width times height of one image, read from its header before decoding; more: 413. Decoding takes up to 12 bytes a
    pixel, of a WebP file 16.
    """
    max_request_pixels: int = Field(400_000_000, ge=1, le=1_000_000_000_000)
    """Pixels of all images of one request together; more: 413. At least max_pixels."""
    max_images: int = Field(64, ge=1, le=10_000)
    """Images in one request; more: 413. At most max_queue_size."""
    max_top_k: int = Field(100, ge=1, le=1_000_000)
    """Number of classes that top_k, or /v2's classification, may ask for; more: 400. Each takes about a microsecond an
    image.
    """
    explain_max_runs: int = Field(1024, ge=0, le=1_000_000)
    """Images, covered and whole, that the model may run for one request to /explain; more: 413. They run while nothing
    else waits. 0: explanations are off.
    """
    inline_decode_bytes: int = Field(32 * 1024, ge=0, le=MIB)
    """JPEG and PNG files of up to this many bytes are decoded on the event loop, if inline_decode_pixels allows it too;
    others go to a decode process. 0: all go there.
    """
    inline_decode_pixels: int = Field(256 * 256, ge=0, le=4_000_000)
    """Pixels of all images of a request together, as above."""
    decode_processes: int = Field(0, ge=0, le=256)
    """Processes that decode other images, in each worker, about 50 MB each; one that ends is replaced. 0: one a CPU
    that may be used, shared between the workers, and at most 4.
    """
    decode_memory_bytes: int = Field(0, ge=0, le=1024 * 1024 * MIB)
    """Bytes of memory that decoding one image may take; more: 413. 0: what the largest image takes, by max_pixels and
    max_body_bytes. Linux only.
    """
    decode_cpu_s: float = Field(5.0, ge=0.01, le=600)
    """Seconds of CPU time that decoding one image may take; more: 413, and its process is replaced."""
    decode_timeout_s: float = Field(30.0, ge=0.01, le=600)
    """Seconds that decoding one image may take, however busy the machine is; then as above."""
    image_formats: Annotated[tuple[Format, ...], NoDecode, BeforeValidator(split_formats)] = Field(
        get_args(Format), min_length=1
    )
    """Formats that are accepted, separated by commas; others: 415. Each that is left out is a decoder less that
    strangers' bytes reach.
    """

    max_connections: int = Field(1024, ge=1, le=1_000_000)
    """Open connections to the main port, in each worker, those in a TLS handshake too; others get 503. The management
    port counts its own up to this number, so that clients keep no probe out.
    """
    header_timeout_s: float = Field(10.0, ge=0.1, le=600)
    """Seconds for a request's headers, and for a TLS handshake; a slower client is disconnected."""
    body_timeout_s: float = Field(30.0, ge=0.1, le=3600)
    """Seconds for a request's body; a slower client gets 408 and is disconnected."""
    write_timeout_s: float = Field(30.0, ge=0.1, le=3600)
    """Seconds that a client may leave a response unread; then it is disconnected."""
    keep_alive_s: int = Field(65, ge=1, le=3600)
    """Seconds that an idle connection stays open; longer than the load balancer's own limit."""

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_list)] = ()
    """Keys, separated by commas, one of which a client must send with images and to /models and /v2/models. None: open
    to all. Flags can be read by other users of the machine: prefer the variable or the file.
    """
    api_keys_file: Path | None = None
    """More of them from a file, one key a line; # starts a comment."""
    admin_key: SecretStr | None = None
    """Key for POST /models/reload; none: reloading there is off."""
    admin_key_file: Path | None = None
    """More of them from a file, one key a line."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)] = ()
    """Origins, separated by commas, whose web pages may call the service; * for any. Each request costs more CPU then,
    as with the access log.
    """
    web_page: bool = True
    """Serve the page at / and Swagger UI at /docs. Off: both are 404. Nobody needs a key to load them."""
    tls_cert: Path | None = None
    """PEM file with the certificate chain; needs tls_key: serves HTTPS."""
    tls_key: Path | None = None
    """PEM file with the private key. Both are read at the start: restart it after a renewal."""

    log_format: Literal["plain", "json"] = "plain"
    """One line or one JSON object per log record."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level logged."""
    access_log: bool = False
    """Log a line per request; the metrics count them in any case. CORS preflights are in neither. Each request costs
    about a third more CPU then.
    """

    @field_validator("api_keys", "admin_key")
    @classmethod
    def _keys_fit_a_header(cls, value: object) -> object:
        for key in value if isinstance(value, tuple) else (value,):
            if isinstance(key, SecretStr) and not _is_key(key.get_secret_value()):
                raise ValueError("a key must be printable ASCII without spaces")
        return value

    @field_validator("device_ids")
    @classmethod
    def _devices_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a device twice; each runs one copy of the model")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin; write https://example.org, without a path, or *")
        return value

    @model_validator(mode="after")
    def _limits_fit_each_other(self) -> Self:
        if self.max_images > self.max_queue_size:
            raise ValueError("max_images must not exceed max_queue_size, or a full request could never be accepted")
        if self.max_body_bytes > self.max_queue_bytes:
            raise ValueError("max_body_bytes must not exceed max_queue_bytes, or a full body could never be accepted")
        if self.max_pixels > self.max_request_pixels:
            raise ValueError("max_pixels must not exceed max_request_pixels, which counts the same image")
        if self.workers != 1 and not sys.platform.startswith("linux"):
            raise ValueError("workers needs Linux, where processes can share a port; leave it at 1")
        if self.management_port is not None and self.management_port == self.port:
            raise ValueError("management_port must not be the port of the clients; name another")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; only one of them is set")
        return self

    @model_validator(mode="after")
    def _files_exist(self) -> Self:
        for name in ("api_keys_file", "admin_key_file", "tls_cert", "tls_key"):
            path: Path | None = getattr(self, name)
            if path is not None and not _is_file(path, name):
                raise ValueError(f"{name}: there is no file {path}")
        if self.admin_key_file is not None and not self.administrator_keys():
            raise ValueError(f"admin_key_file: {self.admin_key_file} holds no key, so reloading over HTTP would be off")
        if self.api_keys_file is not None and not self.client_keys():
            raise ValueError(f"api_keys_file: {self.api_keys_file} holds no key, which would leave the service open")
        return self

    def client_keys(self) -> tuple[str, ...]:
        """Every API key, of the setting and the file; empty: no key is needed."""
        return tuple(key.get_secret_value() for key in self.api_keys) + _read_keys(self.api_keys_file)

    def administrator_keys(self) -> tuple[str, ...]:
        """Every admin key, of the setting and the file; empty: reloading over HTTP is off."""
        of_setting = () if self.admin_key is None else (self.admin_key.get_secret_value(),)
        return of_setting + _read_keys(self.admin_key_file)


def _describe_bounds(field: FieldInfo) -> None:
    """Put the bounds of a field, which are inclusive, behind its description."""
    bounds = {type(bound): bound for bound in field.metadata}
    text = " ".join((field.description or "").split())
    if Ge in bounds and Le in bounds:
        text += f" From {bounds[Ge].ge} to {bounds[Le].le}."
    field.description = text


for _field in Settings.model_fields.values():
    _describe_bounds(_field)
Settings.model_rebuild(force=True)  # the JSON schema shows them too


def _is_key(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def _is_file(path: Path, name: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # as in a folder that this user may not read
        raise ValueError(f"{name}: {path} can't be found: {(error.strerror or str(error)).lower()}") from error


def _read_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as text: {error}") from error
    lines = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line)
    if not all(map(_is_key, keys)):
        raise ValueError(f"a key in {path} is not printable ASCII without spaces")
    return keys
