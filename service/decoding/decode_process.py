"""A process that decodes one image after another, under limits, for the service that started it.

It reads jobs from a socket, writes replies to it, and ends with it: when the service has ended, however that was. It
imports `imaging` and the standard library alone.

    job      lengths of the options and of the file, options as JSON, file
    reply    kind, pixels of the image in the file, length of the payload, payload

A limit on time is a timer of the system whose signal ends the process: nothing in a decoder can hold it up.
"""

import json
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from imaging.decoder import decode
from imaging.errors import (
    ImageError,
    ImageTooCostly,
    NotAnImage,
    TooManyPixels,
    TruncatedImage,
    UnsupportedFormat,
)
from imaging.formats import read_header
from imaging.resize import Crop, Filter
from imaging.structure.header import Format, Header

JOB: Final = struct.Struct("!IQ")
REPLY: Final = struct.Struct("!BQI")
DECODED: Final = 0
# Beside DECODED, a reply's kind is the number of its error here, from 1.
ERRORS: Final[tuple[type[ImageError], ...]] = (
    NotAnImage,
    UnsupportedFormat,
    TruncatedImage,
    TooManyPixels,
    ImageTooCostly,
)
STANDARD_ERROR: Final = 2  # a descriptor
# What a terminal or a service manager sends to all processes: the service alone decides when this one ends.
IGNORED_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may take.

    Attributes:
        memory_bytes: beyond what the idle process has.
        cpu_s: seconds of CPU time.
        wall_s: seconds.
    """

    memory_bytes: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """What to make of a file, beside its bytes.

    Attributes:
        size: (H, W) of the result.
        crop, resample: see `imaging.resize.resize`.
        formats: that are accepted.
        max_pixels: of this image.
        pixels_left: of `max_request_pixels`, which the images of a request may have together.
    """

    size: tuple[int, int]
    crop: Crop
    resample: Filter
    formats: tuple[Format, ...]
    max_pixels: int
    pixels_left: int
    max_request_pixels: int

    def read_header(self, data: bytes) -> Header:
        """Read a file's header, within the limits on pixels; see `imaging.formats.read_header`."""
        header = read_header(data, max_pixels=self.max_pixels, formats=self.formats)
        if header.pixels > self.pixels_left:
            most = self.max_request_pixels
            raise TooManyPixels(f"The images of a request may have {most} pixels together, and have more.")
        return header

    def decode(self, header: Header) -> bytes:
        """Decode the image behind a header to uint8 [H, W, 3]."""
        return decode(header, size=self.size, crop=self.crop, resample=self.resample).tobytes()

    def pack(self, data: bytes) -> bytes:
        """Return what stands before the file."""
        options = json.dumps(asdict(self)).encode()
        return JOB.pack(len(options), len(data)) + options


def main(arguments: Sequence[str]) -> None:
    """Serve the socket whose descriptor is the first argument, under the `Limits` of the second, as JSON."""
    for name in IGNORED_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # What libraries say about clients' files is dropped: else these could fill the disk. The response has the error.
    log = os.dup(STANDARD_ERROR)
    os.dup2(os.open(os.devnull, os.O_WRONLY), STANDARD_ERROR)
    with socket.socket(fileno=int(arguments[0])) as connection:
        try:
            serve(connection, Limits(**json.loads(arguments[1])))
        except ConnectionError:  # the service has ended
            raise
        except Exception:
            os.write(log, traceback.format_exc().encode())
            raise


def serve(connection: socket.socket, limits: Limits) -> None:
    """Say that it is ready, and whether memory is limited; then take jobs until the other side has gone."""
    warm_up()
    connection.sendall(reply(DECODED, int(limit_memory(limits.memory_bytes))))
    with connection.makefile("rb") as stream:
        while len(lengths := stream.read(JOB.size)) == JOB.size:
            options_length, data_length = JOB.unpack(lengths)
            options = json.loads(stream.read(options_length))
            job = Job(**options | {"size": tuple(options["size"])})
            data = stream.read(data_length)
            set_timers(limits.cpu_s, limits.wall_s)
            answer = work(job, data, limits)
            set_timers(0, 0)
            connection.sendall(answer)
            del data, answer  # not kept until the next one


def warm_up() -> None:
    """Decode something once: the first image finds all libraries loaded."""
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    decode(read_header(file.getvalue(), max_pixels=64), size=(4, 4))


def work(job: Job, data: bytes, limits: Limits) -> bytes:
    """Return the reply to a job."""
    pixels = 0
    try:
        header = job.read_header(data)
        pixels = header.pixels
        return reply(DECODED, pixels, job.decode(header))
    except ImageError as error:
        return reply(1 + ERRORS.index(type(error)), pixels, error.message.encode())
    except MemoryError:
        mebibytes = limits.memory_bytes >> 20
        message = f"Decoding the image takes more than the {mebibytes} MiB of memory that are allowed; make it smaller."
        return reply(1 + ERRORS.index(ImageTooCostly), pixels, message.encode())


def reply(kind: int, pixels: int, payload: bytes = b"") -> bytes:
    """Return the bytes of a reply."""
    return REPLY.pack(kind, pixels, len(payload)) + payload


def set_timers(cpu_s: float, wall_s: float) -> None:
    """Let SIGPROF and SIGALRM end this process after so many seconds; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def limit_memory(spare: int) -> bool:
    """Let the system refuse this process more memory than so many bytes beyond what it has; False where it can't."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + spare if hard == resource.RLIM_INFINITY else min(used + spare, hard)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (ImportError, OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    with suppress(ConnectionError):
        main(sys.argv[1:])
    os._exit(0)
