"""Logging to stderr, one line or one JSON object a record. No image, no key and no body is ever logged."""

import json
import logging
import logging.config
import time
import warnings
from typing import Final

from service.errors import printable
from service.settings import Settings

# Attributes of a record that are logged after its message.
EXTRAS: Final = ("request_id", "status", "milliseconds")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name in EXTRAS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class PlainFormatter(logging.Formatter):
    """Time, level, message, and EXTRAS in one line; a traceback below it is indented.

    What a record quotes (a label, a path, an error) can neither begin a line of its own nor move the cursor.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line without a traceback."""
        extras = [f"{name}={value}" for name in EXTRAS if (value := getattr(record, name, None)) is not None]
        return printable(" ".join([super().formatMessage(record), *extras]))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback."""
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def configure(settings: Settings) -> None:
    """Set up logging for this process."""
    level = settings.log_level.upper()
    formatter = JsonFormatter if settings.log_format == "json" else PlainFormatter
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"chosen": {"()": formatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
            "root": {"level": level, "handlers": ["stderr"]},
            "loggers": {
                # Their debug records hold pieces of bodies and image files. Their warnings are about clients' input:
                # the response has the error, and a client must not fill the disk.
                "PIL": {"level": "CRITICAL"},
                "uvicorn": {"level": "ERROR"},
            },
        }
    )
    logging.captureWarnings(True)
    # Python stores every distinct warning, and Pillow's contain numbers from the files.
    warnings.filterwarnings("ignore", module=r"PIL\.")
