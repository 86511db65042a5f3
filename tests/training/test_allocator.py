"""A process that trains keeps its memory: no page faults for tensors of sizes that it had before."""

import subprocess
import sys

import pytest

# Prints the page faults of 20 tensors of 64 MiB, each freed before the next. The heap takes a few to find its form.
PROGRAM = """
import resource, sys
import torch
from training.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
for _ in range(40):
    torch.empty(2**24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False)
    if "no glibc" in done.stderr:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.serial
def test_freed_memory_is_used_again() -> None:
    assert page_faults("keep") < 1000 < 20_000 < page_faults("default")
