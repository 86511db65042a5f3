"""The deployment's files, parsed once for all tests."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = ROOT / "docker-compose.yml"
CPU = DOCKER / "compose.cpu.yml"
KEYS = DOCKER / "compose.keys.yml"
REPLICAS = DOCKER / "compose.replicas.yml"
COMPOSE_FILES = (COMPOSE, CPU, KEYS, REPLICAS)
DOCKERFILES = tuple(sorted(DOCKER.glob("*.Dockerfile")))
RULES = tuple(sorted((DOCKER / "prometheus" / "rules").glob("*.yml")))

Yaml = dict[str, Any]

# panel.py and its neighbours are scripts, not a package.
sys.path.insert(0, str(DOCKER / "grafana"))
sys.path.insert(0, str(DOCKER))


class Reset:
    """What `!reset` stands for: the key is gone after the merge."""


class ComposeLoader(yaml.SafeLoader):
    """YAML with the tag that the Compose specification adds for merges; a doubled key is refused, as Compose does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Yaml:
        keys = [key.value for key, _ in node.value]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        assert not doubled, f"{doubled} twice{node.start_mark}"
        return super().construct_mapping(node, deep)


ComposeLoader.add_constructor("!reset", lambda loader, node: Reset())


@cache
def compose(path: Path = COMPOSE) -> Yaml:
    return yaml.load(path.read_text(), ComposeLoader)


@cache
def prometheus_config() -> Yaml:
    return yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())


@cache
def rules() -> tuple[Yaml, ...]:
    """All rules, recording and alerting, in their order."""
    documents = [yaml.safe_load(path.read_text()) for path in RULES]
    return tuple(rule for document in documents for group in document["groups"] for rule in group["rules"])


def alerts() -> list[Yaml]:
    return [rule for rule in rules() if "alert" in rule]


def variables(text: str) -> dict[str, set[str]]:
    """Names and defaults of the ${NAME:-default} in a compose file."""
    found: dict[str, set[str]] = {}
    for name, default in re.findall(r"\$\{([A-Z_]+)(?::-([^}]*))?\}", text):
        found.setdefault(name, set()).add(default)
    return found


def filled_in(value: str) -> str:
    """A value of a compose file with the defaults of its variables."""
    return re.sub(r"\$\{[A-Z_]+(?::-([^}]*))?\}", lambda match: match[1] or "", value)
