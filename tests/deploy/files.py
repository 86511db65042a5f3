"""Where the files of deploy/ lie, and what is the same in all of its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Yaml = dict[str, Any]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "perceiver"
KSERVE = DEPLOY / "kserve"
CRDS = Path(__file__).parent / "crds"

VALUES: Yaml = yaml.safe_load((CHART / "values.yaml").read_text())
