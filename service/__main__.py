"""python -m service: serve the model. `--help` lists every setting."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Files, sockets and libraries beside the connections.
SPARE_FILES = 256
LAST_STREAM = 2  # the descriptor of standard error


def main(arguments: Sequence[str]) -> int:
    """Return the exit status.

    0 after a drain, 1 where the service could not start or go on, 2 for wrong settings, 130 where Ctrl-C ended it at
    once: before it listened for signals, or with a second one.
    """
    replace_closed_streams()
    try:
        return serve(arguments)
    except KeyboardInterrupt:
        return 130


def replace_closed_streams() -> None:
    """Open nothing in place of standard input, output and error, where this was started without.

    The next files would get their numbers, and libuv ends the process (SIGABRT) when one of these is closed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def serve(arguments: Sequence[str]) -> int:
    """Read the settings and serve; return the exit status."""
    with killed_by_ctrl_c():
        from service.cli import UsageError, load_settings

    try:
        settings = load_settings(arguments)
    except UsageError as error:
        for problem in error.problems:
            print(f"python -m service: {problem}", file=sys.stderr)
        return 2

    with killed_by_ctrl_c():
        from service import launcher  # after the settings: --help and typing errors are answered at once
        from service.logging import configure as configure_logging

    configure_logging(settings)
    allow_open_files(settings.max_connections + SPARE_FILES)
    return launcher.run(settings)


@contextmanager
def killed_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process without a word: libraries being imported turn KeyboardInterrupt into errors."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:  # a shell may have it ignored
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def allow_open_files(number: int) -> None:
    """Raise the soft limit of open files towards what the connections need; the usual 1,024 is too few.

    Where that may not be, say so: beyond it, a connection is closed without a word, and no count knows of it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < number:
        logging.getLogger("service").warning(
            "this system allows %d open files, and max_connections asks for %d: further connections will be closed "
            "unanswered; raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower max_connections",
            hard,
            number,
        )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it may have been started with one closed
            stream.flush()
    # Not sys.exit: a thread that hangs in a driver must not keep a failed process from being replaced.
    os._exit(status)
