"""How many files the service may open."""

import subprocess
import sys

import pytest

from tests.end_to_end.process import ROOT


@pytest.mark.parametrize(("number", "warnings"), [(64, 0), (65, 1)])
def test_a_limit_of_open_files_that_is_too_low_is_told(number: int, warnings: int) -> None:
    program = f"""
import resource
from service.__main__ import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))
allow_open_files({number})
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, 64)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this system allows 64 open files") == warnings
