"""promtool, as the tests of docker/ use it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.files import Yaml

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; it is in Debian's package prometheus"
)


def promtool(*arguments: object) -> None:
    """Run it; fail with its words where it finds something."""
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def expect(folder: Path, query: str, series: dict[str, str], values: dict[str, float | None]) -> None:
    """Hold a query that gives one number, or nothing (None), to its values at some times; a sample each 10 s."""
    test: Yaml = {
        "interval": "10s",
        "input_series": [{"series": name, "values": samples} for name, samples in series.items()],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": time,
                "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
            }
            for time, value in values.items()
        ],
    }
    path = folder / "query.yml"
    path.write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", path)
