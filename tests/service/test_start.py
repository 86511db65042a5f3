"""What signals ask of the service where HTTP has processes of its own, and how many files it may open."""

import asyncio
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from service.start import Stopping
from tests.end_to_end.process import ROOT


async def test_the_first_signal_has_the_service_leave_in_the_same_turn_and_the_second_ends_it() -> None:
    service = SimpleNamespace(leaving=False)
    stopping = Stopping(service)  # type: ignore[arg-type]
    try:
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while not stopping.asked:  # noqa: ASYNC110 - a signal
                await asyncio.sleep(0)
        assert service.leaving  # before anybody can see that an HTTP process has ended of the same signal
        assert not stopping.at_once
        signal.raise_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            while not stopping.at_once:  # noqa: ASYNC110 - a signal
                await asyncio.sleep(0)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)


@pytest.mark.parametrize(("number", "warnings"), [(64, 0), (65, 1)])
def test_a_limit_of_open_files_that_is_too_low_is_told(number: int, warnings: int) -> None:
    program = f"""
import resource
from service.__main__ import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))
allow_open_files({number})
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, 64)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert told.stderr.count("this system allows 64 open files") == warnings
