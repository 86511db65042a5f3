"""What every test needs."""

import signal

import hypothesis
import pytest

from tests.end_to_end import process
from tests.service import harness

# A shell that starts the tests in the background (`make test &`) has SIGINT ignored, and processes that tests start and
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nor is the time of an example of hypothesis a test: 200 ms pass on a machine that others use as well.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(params=[0, 2], ids=["alone", "http-processes"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test twice: HTTP in the model's process, and in processes of its own."""
    monkeypatch.setattr(harness, "HTTP_PROCESSES", request.param)
    monkeypatch.setattr(process, "HTTP_PROCESSES", request.param)
