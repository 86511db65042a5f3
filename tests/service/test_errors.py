"""The errors as clients see them."""

import re
from pathlib import Path

import pytest

from service import errors
from service.api.options import MAX_DIGITS, read_options
from service.api.response import error_response
from service.errors import ERRORS, ServiceError


def test_every_error_has_its_own_code_a_status_and_a_sentence() -> None:
    assert len({kind.code for kind in ERRORS}) == len(ERRORS) > 25
    assert all(400 <= kind.status < 600 for kind in ERRORS)
    assert all(kind.default.endswith((".", "jpg")) and kind.when.endswith(".") for kind in ERRORS)
    assert all(getattr(errors, kind.__name__) is kind for kind in ERRORS)


@pytest.mark.parametrize("kind", ERRORS)
def test_there_is_no_error_that_nothing_raises(kind: type[ServiceError]) -> None:
    """The reference would tell of a code that no answer has."""
    own = Path(errors.__file__)
    others = "".join(path.read_text(encoding="utf-8") for path in own.parent.rglob("*.py") if path != own)
    assert re.search(rf"\b{kind.__name__}\b", others)


def test_a_timeout_of_more_digits_than_are_read_is_told_the_most() -> None:
    most = 10**MAX_DIGITS - 1
    length = (b"content-length", b"1")
    read_options([length, (b"x-request-timeout-ms", b"%d" % most)], 1000)
    with pytest.raises(errors.InvalidTimeout, match=f"between 1 and {most}"):
        read_options([length, (b"x-request-timeout-ms", b"%d" % (most + 1))], 1000)


def test_a_message_of_its_own_replaces_the_default() -> None:
    assert errors.NotAnImage().message == errors.NotAnImage.default
    assert str(errors.NotAnImage("no")) == "no"
    assert errors.Overloaded(retry_after=3).retry_after == 3


@pytest.mark.parametrize(("seconds", "sent"), [(0.2, b"1"), (1.0, b"1"), (1.2, b"2"), (59.5, b"60")])
def test_who_comes_again_after_retry_after_does_not_come_too_early(seconds: float, sent: bytes) -> None:
    response = error_response(errors.Overloaded(retry_after=seconds), "an-id")
    assert dict(response.headers)[b"retry-after"] == sent
