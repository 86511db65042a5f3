"""Log records as lines and as JSON."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from service.logging import configure
from service.settings import Settings


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("PIL", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(log_format="json"))
    logging.getLogger("service.x").info("said %s", "this", extra={"request_id": "abc", "milliseconds": 1.5})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("service.x").exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "service.x",
        "message": "said this",
        "request_id": "abc",
        "milliseconds": 1.5,
    }
    assert "ValueError: why" in second["exception"]


def test_plain(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings())
    logging.getLogger("service.x").warning("said this", extra={"request_id": "abc"})
    line = capsys.readouterr().err
    assert line.endswith("WARNING  said this request_id=abc\n")


@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n", "\v", "\x85", "\u2028"])
def test_what_a_plain_record_quotes_forges_no_line(capsys: pytest.CaptureFixture[str], break_: str) -> None:
    configure(Settings())
    forged = f"cat{break_}2026-11-30 00:00:00,000 INFO     listening \x1b[2Jon everything"
    logging.getLogger("service.x").warning("the label %s", forged, extra={"request_id": forged})
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("service.x").exception("failed: %s", forged)
    written = capsys.readouterr().err
    lines = written.splitlines()
    assert [line[24:32].strip() for line in lines if not line.startswith(" ")] == ["WARNING", "ERROR"]
    assert all(line.isprintable() for line in lines)
    assert f"the label cat{ascii(break_)[1:-1]}2026-11-30 00:00:00,000 INFO     listening \\x1b[2Jon" in lines[0]


def test_the_level_is_obeyed_and_libraries_stay_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(log_level="debug"))
    for name in ("PIL.TiffImagePlugin", "uvicorn.error"):
        logging.getLogger(name).debug("pieces of a body")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("service.x").debug("mine")
    assert capsys.readouterr().err.count("\n") == 1
    configure(Settings(log_level="error"))
    logging.getLogger("service.x").warning("no")
    assert capsys.readouterr() == ("", "")


def test_what_a_client_has_sent_wrong_does_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        configure(Settings(log_level="debug"))
        logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded: 9")
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 9, "PIL.TiffImagePlugin")
        assert capsys.readouterr().err == ""
        warnings.warn_explicit("of our own", UserWarning, "decoding.py", 9, "service.decoding.decoder", registry={})
        assert "of our own" in capsys.readouterr().err


def test_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings())
    logging.getLogger("service.x").error("x")
    sys.stdout.flush()
    assert capsys.readouterr().out == ""
