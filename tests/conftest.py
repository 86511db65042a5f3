"""What every test needs."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# A shell that starts the tests in the background (`make test &`) has SIGINT ignored, and processes that tests start and
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files run side by side, one a core. There torch's threads, here and in what tests start, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nor is the time of an example of hypothesis a test: 200 ms pass on a machine that others use as well.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Files that take longest, the longest first: one that begins last would keep a core waiting for it. `make test` prints
# the slowest tests. The second one makes an environment from PyPI, which the network takes most of.
LONG = (
    "tests/end_to_end/test_own_images.py",
    "tests/end_to_end/test_v2_clients.py",
    "tests/benchmarks/test_commands.py",
    "tests/end_to_end/test_service_process.py",
    "tests/benchmarks/test_gpu_report.py",
    "tests/docs/test_commands.py",
    "tests/export/test_variants.py",
    "tests/export/test_export.py",
    "tests/export/test_int8.py",
    "tests/export/test_errors.py",
    "tests/end_to_end/test_page.py",
    "tests/end_to_end/test_workers.py",
    "tests/end_to_end/test_busy_process.py",
    "tests/end_to_end/test_replicas.py",
    "tests/docker/test_live.py",
    "tests/docker/test_alarms.py",
    "tests/training/test_processes.py",
    "tests/training/test_command.py",
    "tests/training/test_distributed.py",
    "tests/training/test_plots.py",
    "tests/chaos/test_openapi.py",
    "tests/chaos/test_chaos.py",
    "tests/chaos/test_costly.py",
    "tests/deploy/test_values.py",
    "tests/deploy/test_upgrade.py",
    "tests/deploy/test_model_folder.py",
    "tests/service/server/test_garbage.py",
    "tests/end_to_end/test_nginx.py",
    "tests/end_to_end/test_tls.py",
    "tests/end_to_end/test_explanations.py",
)
PLACES = {name: place for place, name in enumerate(LONG)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the order of the others, and within a file, stays."""
    items.sort(key=lambda item: PLACES.get(_name(item.path, config.rootpath), len(LONG)))


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
