"""Write .env.example: what docker-compose.yml reads, then every setting of the service, from `service.settings`.

Run where the project is installed, in the environment that `make test` makes: python docker/env_example.py
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from service.settings import Settings

TARGET = Path(__file__).parent.parent / ".env.example"

HEAD = """\
# Every variable that docker-compose.yml reads. Copy it to .env, which git ignores, and change what you need: all have a
# default, the one written here. Single quotes around a value with $ or #: else Compose takes $word for a variable, and
# the rest goes. Written by `python docker/env_example.py`.

# Which compose files, and which profiles, `docker compose` takes when it is not told. docker/compose.cpu.yml is for a
# host without a GPU, docker/compose.keys.yml for keys from files, docker/compose.replicas.yml for several replicas; a
# colon stands between them, as in docker-compose.yml:docker/compose.cpu.yml. Profile gpu adds NVIDIA's exporter.
#COMPOSE_FILE=docker-compose.yml
#COMPOSE_PROFILES=

# The folder below models/ that is served, and the user who owns models/ on the host (`id -u`, `id -g`).
#MODEL_NAME=perceiver-cifar100
#RUN_AS_UID=1000
#RUN_AS_GID=1000

# GPUs that service and training get; with more than one, set PERCEIVER_DEVICE_IDS=0,1,... too.
#GPU_COUNT=1

# Memory at which a container is killed, and the time between SIGTERM and that: six seconds longer than
# PERCEIVER_DRAIN_DELAY_S and PERCEIVER_DRAIN_TIMEOUT_S together.
#SERVICE_MEMORY=8g
#TRAINING_MEMORY=32g
#STOP_GRACE_PERIOD=45s

# Where the ports listen: 127.0.0.1 is this host alone, 0.0.0.0 everywhere, past most firewalls' rules. Before you open
# the service, set PERCEIVER_API_KEYS and put a TLS proxy in front of it. MONITORING_ADDRESS opens Grafana, and with it
# Prometheus, which asks nobody for a password. An IPv6 address stands in brackets.
#SERVICE_ADDRESS=127.0.0.1
#SERVICE_PORT=8000
#MONITORING_ADDRESS=127.0.0.1
#GRAFANA_PORT=3000
#PROMETHEUS_PORT=9090
# Where operators reach Prometheus: alarms that are sent link to it, and to the runbook that it shows. If it has a
# path, the proxy there must strip it: Prometheus itself answers at /.
#PROMETHEUS_URL=http://localhost:9090

# Grafana. Without a password one is made up at the first start: docs/deployment.md. ANONYMOUS=true lets everybody look.
#GRAFANA_ADMIN_USER=admin
#GRAFANA_ADMIN_PASSWORD=
#GRAFANA_ANONYMOUS=false

# The label `host` of every alarm that is sent: docs/deployment.md, "Sending alarms". Without it there is no such label.
#HOST_LABEL=

# How long, and how much, Prometheus keeps; the first limit that is reached counts.
#PROMETHEUS_RETENTION=30d
#PROMETHEUS_RETENTION_SIZE=10GB

# With docker/compose.replicas.yml: how many there are.
#REPLICAS=2

# Written into the images' labels and tags; the revision also into the checkpoints that are trained there.
#VERSION=local
#REVISION=unknown

# With docker/compose.keys.yml: the files with the keys.
#API_KEYS_FILE=./secrets/api-keys
#ADMIN_KEY_FILE=./secrets/admin-key

# TLS is the work of a proxy in front: PERCEIVER_TLS_CERT and PERCEIVER_TLS_KEY do not reach the container.

# The run of `docker compose --profile training run training`; empty: a new one, named by the time.
#RUN=

# --- The service's own settings ---
"""

# What the compose files or the image decide.
FIXED = {"model_dir", "host", "port", "tls_cert", "tls_key", "api_keys_file", "admin_key_file"}
# Where the compose file's default is not the service's.
COMPOSE_DEFAULTS = {"provider": "cuda", "log_format": "json"}


def settings() -> Iterator[str]:
    """Yield a comment and a line for each setting that is open."""
    for name, field in Settings.model_fields.items():
        if name in FIXED:
            continue
        yield "\n" + textwrap.fill(
            field.description or "", 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        default = COMPOSE_DEFAULTS.get(name, as_text(field.default))
        yield f"#PERCEIVER_{name.upper()}={default}"


def as_text(value: object) -> str:
    """Return a default as it would be written in the environment."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def text() -> str:
    """Return the file's content."""
    return HEAD + "\n".join(settings()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
