"""The compose files: against the specification's schema, against Docker where it is, and against what they name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.docker.files import (
    COMPOSE,
    COMPOSE_FILES,
    CPU,
    DOCKER,
    KEYS,
    REPLICAS,
    ROOT,
    Reset,
    Yaml,
    compose,
    filled_in,
    prometheus_config,
    variables,
)

SERVICES: dict[str, Yaml] = compose()["services"] | {"nginx": compose(REPLICAS)["services"]["nginx"]}
OWN = ("service", "training")
EXAMPLE = (ROOT / ".env.example").read_text()


def mounts(service: str) -> list[Yaml]:
    """Bind mounts and volumes of a service, in the long form."""
    short = {"type": "volume", "read_only": False}
    return [
        mount if isinstance(mount, dict) else short | dict(zip(("source", "target"), mount.split(":"), strict=True))
        for mount in SERVICES[service]["volumes"]
    ]


def on_the_host(service: str, path: str) -> Path:
    """Where a file lies that a service sees through a bind mount."""
    for mount in mounts(service):
        if mount["type"] == "bind" and path.startswith(mount["target"] + "/"):
            return ROOT / mount["source"] / path.removeprefix(mount["target"] + "/")
    raise AssertionError(f"{service} does not see {path}")


def container_port(service: str) -> int:
    (port,) = SERVICES[service]["ports"]
    return int(port.rpartition(":")[2])


def plain(value: Any) -> Any:
    """The document without the merge tags, which the schema does not know."""
    if isinstance(value, Reset):
        return []
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_schema_of_the_compose_specification(path: Path, tmp_path: Path):
    document = tmp_path / "compose.json"
    document.write_text(json.dumps(plain(compose(path))))
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", document]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def docker_compose_problem() -> str:
    if shutil.which("docker") is None:
        return "there is no docker"
    run = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True)
    return "" if run.returncode == 0 else "docker has no compose plugin"


@pytest.mark.skipif(bool(docker_compose_problem()), reason=docker_compose_problem() or "-")
@pytest.mark.parametrize(
    "more",
    [(), (CPU,), (KEYS,), (CPU, KEYS), (REPLICAS,), (REPLICAS, CPU, KEYS)],
    ids=lambda more: "+".join(p.name for p in more),
)
def test_docker_compose_reads_them(more: tuple[Path, ...]):
    files = [argument for path in (COMPOSE, *more) for argument in ("-f", str(path))]
    command = ["docker", "compose", *files, "--profile", "gpu", "--profile", "training", "config"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    merged = yaml.safe_load(run.stdout)["services"]
    for name in OWN:
        devices = merged[name]["deploy"]["resources"].get("reservations", {}).get("devices", [])
        assert bool(devices) == (CPU not in more)
    assert merged["service"]["environment"]["PERCEIVER_PROVIDER"] == ("cpu" if CPU in more else "cuda")
    published = {name for name, service in merged.items() if service.get("ports")}
    assert published == {"nginx" if REPLICAS in more else "service", "prometheus", "grafana"}


def test_every_image_is_pinned_to_a_version():
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+[\w.-]*", service["image"]), name


@pytest.mark.parametrize("name", OWN)
def test_what_is_built_here_can_be_built(name: str):
    build = SERVICES[name]["build"]
    dockerfile = (ROOT / build["context"] / build["dockerfile"]).read_text()
    for argument in build["args"]:
        assert re.search(rf"^ARG {argument}\b", dockerfile, re.MULTILINE), argument


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str):
    for mount in mounts(name) if "volumes" in SERVICES[name] else []:
        if mount["type"] == "volume":
            assert mount["source"] in compose()["volumes"]
        else:
            assert (ROOT / mount["source"]).is_dir()
            # With create_host_path false, or not named, Compose 2.26 asks by an interface that knows no label.
            assert mount["bind"] == {"selinux": "z", "create_host_path": True}


def test_served_model_exists():
    folder = filled_in(SERVICES["service"]["environment"]["PERCEIVER_MODEL_DIR"])
    assert list(on_the_host("service", folder).glob("[1-9]*/model.onnx"))


def test_models_are_read_only_for_the_service_and_shared_with_the_training():
    serving, training = mounts("service")[0], mounts("training")[0]
    assert (serving["target"], serving["source"]) == (training["target"], training["source"])
    assert serving["read_only"] is True
    assert "read_only" not in training
    import train_and_export

    assert str(train_and_export.MODELS) == training["target"]
    assert SERVICES["training"]["environment"]["MODEL_NAME"] is None  # as it is set; the script has the default
    assert filled_in(SERVICES["service"]["environment"]["PERCEIVER_MODEL_DIR"]) == f"/models/{train_and_export.SHIPPED}"
    assert SERVICES["service"]["user"] == SERVICES["training"]["user"]


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "dcgm-exporter"])
def test_containers_have_no_more_rights_than_they_need(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_limited_and_started_again(name: str):
    service = SERVICES[name]
    assert "memory" in service["deploy"]["resources"]["limits"]
    assert service["restart"] == ("no" if name == "training" else "unless-stopped")
    assert "max-size" in service["logging"]["options"]


def test_ports_are_open_to_this_host_alone_unless_set():
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert filled_in(port).startswith("127.0.0.1:")


def test_dashboard_waits_for_a_healthy_prometheus():
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert "healthcheck" in SERVICES["prometheus"]
    assert "healthcheck" in SERVICES["grafana"]
    assert "HEALTHCHECK" in (DOCKER / "service.Dockerfile").read_text()


def test_replicas_are_reached_through_nginx_alone():
    replicas = compose(REPLICAS)
    (inside,) = replicas["networks"]
    assert replicas["networks"][inside] == {"internal": True}
    services = replicas["services"]
    assert services["service"]["networks"] == [inside]
    assert isinstance(services["service"]["ports"], Reset)
    assert services["nginx"]["networks"] == services["prometheus"]["networks"] == ["default", inside]
    assert filled_in(services["service"]["deploy"]["replicas"]) == "2"


def test_nginx_finds_its_configuration_and_the_replicas():
    nginx = SERVICES["nginx"]
    command = nginx["entrypoint"]
    text = on_the_host("nginx", command[command.index("-c") + 1]).read_text()
    port = container_port("service")
    dockerfile = (DOCKER / "service.Dockerfile").read_text()
    assert f"EXPOSE {port}\n" in dockerfile
    assert f"server service:{port} resolve" in text
    assert f"listen {container_port('nginx')};" in text
    assert nginx["user"] != "0:0"
    assert nginx["ports"][0].rpartition(":")[0] == SERVICES["service"]["ports"][0].rpartition(":")[0]
    assert nginx["stop_grace_period"] == SERVICES["service"]["stop_grace_period"]


def test_grafana_asks_prometheus_through_no_proxy():
    assert SERVICES["grafana"]["environment"]["NO_PROXY"] == "prometheus"


def test_drain_fits_into_the_grace_period():
    grace = filled_in(SERVICES["service"]["stop_grace_period"])
    drain = filled_in(SERVICES["service"]["environment"]["PERCEIVER_DRAIN_TIMEOUT_S"])
    assert float(drain) == Settings.model_fields["drain_timeout_s"].default
    delay = filled_in(SERVICES["service"]["environment"]["PERCEIVER_DRAIN_DELAY_S"])
    assert float(delay) == Settings.model_fields["drain_delay_s"].default
    assert float(grace.removesuffix("s")) > float(delay) + float(drain) + 6


def test_prometheus_is_given_what_its_configuration_reads():
    used = set(re.findall(r"\$\{(\w+)\}", (DOCKER / "prometheus" / "prometheus.yml").read_text()))
    assert used == set(SERVICES["prometheus"]["environment"]) == {"HOST_LABEL"}


def test_prometheus_scrapes_what_runs():
    dockerfile = (DOCKER / "service.Dockerfile").read_text()
    port = container_port("service")
    assert f"EXPOSE {port}\n" in dockerfile
    assert f"PERCEIVER_PORT={port} " in dockerfile
    service, *others = prometheus_config()["scrape_configs"]
    (found,) = service["dns_sd_configs"]
    assert (found["names"], found["type"], found["port"]) == (["service"], "A", port)
    targets = [target for job in others for target in job["static_configs"][0]["targets"]]
    assert targets == [
        f"localhost:{container_port('prometheus')}",
        f"grafana:{container_port('grafana')}",
        "dcgm-exporter:9400",  # the port of NVIDIA's image
    ]
    assert {target.partition(":")[0] for target in targets} - {"localhost"} <= set(SERVICES)


def test_prometheus_finds_its_configuration():
    (config,) = [flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--config.file=")]
    path = on_the_host("prometheus", config.partition("=")[2])
    assert path.is_file()
    for pattern in prometheus_config()["rule_files"]:
        assert list(path.parent.glob(pattern))
    data = mounts("prometheus")[-1]["target"]
    assert f"--storage.tsdb.path={data}" in SERVICES["prometheus"]["command"]
    (assets,) = [flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--web.user-assets=")]
    assert on_the_host("prometheus", f"{assets.partition('=')[2]}/docs/operations.md").is_file()


def test_grafana_finds_its_configuration():
    environment = SERVICES["grafana"]["environment"]
    assert on_the_host("grafana", SERVICES["grafana"]["entrypoint"][1]).is_file()
    provisioning = "/etc/grafana/provisioning"
    found = on_the_host("grafana", f"{provisioning}/dashboards/perceiver.yml")
    (provider,) = yaml.safe_load(found.read_text())["providers"]
    home = on_the_host("grafana", environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.is_file()
    assert on_the_host("grafana", provider["options"]["path"]) == home.parent
    found = on_the_host("grafana", f"{provisioning}/datasources/prometheus.yml")
    (source,) = yaml.safe_load(found.read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{container_port('prometheus')}"
    assert source["jsonData"]["timeInterval"] == prometheus_config()["global"]["scrape_interval"]
    assert filled_in(environment["GF_AUTH_ANONYMOUS_ENABLED"]) == "false"
    assert filled_in(environment["GF_SECURITY_ADMIN_PASSWORD"]) == ""


def test_every_variable_is_in_the_example_with_its_default_and_no_other_is():
    used: dict[str, set[str]] = {}
    for path in COMPOSE_FILES:
        for name, defaults in variables(path.read_text()).items():
            used.setdefault(name, set()).update(defaults)
    assert all(len(defaults) == 1 for defaults in used.values()), used
    told = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
    passed_on = {
        name for service in SERVICES.values() for name, value in service.get("environment", {}).items() if value is None
    }
    of_docker = {"COMPOSE_FILE", "COMPOSE_PROFILES"}
    assert set(told) == set(used) | passed_on | of_docker
    assert {name: {told[name]} for name in used} == used


def test_every_setting_of_the_service_can_be_set():
    import env_example

    known = {f"PERCEIVER_{name.upper()}" for name in Settings.model_fields}
    fixed = {f"PERCEIVER_{name.upper()}" for name in env_example.FIXED}
    given = set(SERVICES["service"]["environment"])
    assert given <= known
    assert known - fixed <= given, "docker-compose.yml must pass them on"


def test_the_cpu_variant_is_a_line_in_env_and_every_command_names_the_version_of_compose():
    needed = "# Compose 2.24.4 or newer: docker compose version"
    for page in ("README.md", "docs/deployment.md"):
        text = (ROOT / page).read_text()
        assert f"\n    echo COMPOSE_FILE=docker-compose.yml:{CPU.relative_to(ROOT)} >> .env\n" in text
        assert "-f docker-compose.yml" not in text
        assert re.search(rf"^    docker compose up -d --wait +{needed}$", text, re.MULTILINE)


def test_what_old_versions_of_compose_say_is_explained():
    """What each file has that docker-compose 1.29 of Debian 12 does not know; the words are its own."""
    told = (DOCKER.parent / "docs/deployment.md").read_text().partition("### When it does not start")[2]
    assert "create_host_path" in COMPOSE.read_text()
    assert "contains unsupported option: 'create_host_path'" in told
    assert "!reset" in CPU.read_text()
    assert "could not determine a constructor for the tag '!reset'" in told


@pytest.mark.parametrize("page", ["docs/deployment.md", ".env.example"])
def test_what_does_not_reach_the_container_is_said(page: str):
    given = set(SERVICES["service"]["environment"])
    text = (ROOT / page).read_text()
    for name in ("PERCEIVER_TLS_CERT", "PERCEIVER_TLS_KEY"):
        assert name not in given
        assert name in text


@pytest.mark.smoke
def test_example_is_what_its_generator_writes():
    import env_example

    assert env_example.text() == EXAMPLE, "run python docker/env_example.py"


def test_keys_from_files_are_not_in_the_repository():
    service = compose(KEYS)["services"]["service"]
    for name in service["secrets"]:
        assert f"/run/secrets/{name}" in service["environment"].values()
        path = filled_in(compose(KEYS)["secrets"][name]["file"])
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0, path
    assert subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=ROOT).returncode == 0
