"""Settings from flags and environment, and a sentence for everything that is wrong with them."""

import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.cli import UsageError, flag, load_settings, variable
from service.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PERCEIVER_")]:
        monkeypatch.delenv(name)


def problems(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        load_settings(arguments)
    return caught.value.problems


def test_the_defaults_are_valid_and_complete() -> None:
    settings = load_settings([])
    assert settings.model_dir == Path("models/perceiver-cifar100")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.client_keys() == ()
    assert settings.administrator_keys() == ()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "9000", 9000),
        ("model_dir", "/models/x", Path("/models/x")),
        ("model_version", "3", 3),
        ("max_queue_delay_ms", "2.5", 2.5),
        ("device_ids", "0, 2", (0, 2)),
        ("cors_origins", "https://a.example,http://b.example:8080", ("https://a.example", "http://b.example:8080")),
        ("api_keys", "one,two", (SecretStr("one"), SecretStr("two"))),
        ("provider", "cuda", "cuda"),
        ("image_formats", "jpeg, PNG", ("JPEG", "PNG")),
        ("gpu_memory_limit_bytes", "1073741824", 1 << 30),
    ],
)
def test_every_setting_is_a_variable_and_a_flag_and_the_flag_wins(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    assert getattr(load_settings([flag(name), text]), name) == value
    monkeypatch.setenv(variable(name), text)
    assert getattr(load_settings([]), name) == value
    monkeypatch.setenv(variable("port"), "1")
    assert load_settings(["--port", "2"]).port == 2


def test_switches() -> None:
    assert load_settings(["--access-log"]).access_log
    assert not load_settings(["--no-access-log"]).access_log
    assert not load_settings(["--no-cuda-graphs"]).cuda_graphs


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_MODEL_VERSION", "")
    monkeypatch.setenv("PERCEIVER_API_KEYS", "")
    settings = load_settings([])
    assert settings.model_version is None
    assert settings.client_keys() == ()


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name, field in Settings.model_fields.items():
        assert flag(name) in text
        assert variable(name) in text
        assert field.description
        assert field.description.endswith(".")


def test_every_number_has_its_bounds_in_its_description() -> None:
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            assert " From " in (field.description or ""), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--port", "70000"],
            "PERCEIVER_PORT (--port): input should be less than or equal to 65535, and it is '70000'.",
        ),
        (["--port", "http"], "and it is 'http'."),
        (["--max-batch-size", "0"], "PERCEIVER_MAX_BATCH_SIZE (--max-batch-size): input should be greater than"),
        (["--provider", "gpu"], "'cuda'"),
        (["--image-formats", "png,jpg"], "PERCEIVER_IMAGE_FORMATS (--image-formats): input should be 'JPEG', 'PNG'"),
        (["--image-formats", ","], "is set and holds nothing"),
        (["--device-ids", "0,-1"], "PERCEIVER_DEVICE_IDS (--device-ids): input should be greater than or equal to 0"),
        (["--device-ids", ","], "is set and holds nothing"),
        (["--device-ids", "1,0,1"], "names a device twice"),
        (["--api-keys", ","], "is set and holds nothing"),
        (["--api-keys", ""], "--api-keys is given an empty value"),
        (["--api-keys="], "--api-keys is given an empty value"),
        (["--port=1", "--admin-key", "", "--host", "::"], "--admin-key is given an empty value"),
        (["--cors-origins", " , "], "is set and holds nothing"),
        (["--model-poll-s", "nan"], "finite number"),
        (["--cors-origins", "example.org"], "'example.org' is not an origin; write https://example.org"),
        (["--cors-origins", "https://example.org/app"], "without a path"),
        (["--cors-origins", "https://"], "'https://' is not an origin"),
        (["--max-images", "2000"], "max_images must not exceed max_queue_size"),
        (["--max-queue-bytes", "2000"], "max_body_bytes must not exceed max_queue_bytes"),
        (["--max-request-pixels", "9"], "max_pixels must not exceed max_request_pixels"),
        (["--tls-cert", "/nowhere.pem"], "tls_cert and tls_key go together"),
        (["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"], "tls_cert: there is no file /nowhere.pem"),
        (["--admin-key-file", "/dev/null"], "admin_key_file: there is no file /dev/null"),
        (["--api-keys-file", "/nowhere"], "api_keys_file: there is no file /nowhere"),
        (["--api-keys-file", "/" + 300 * "a"], "can't be found: file name too long"),
        (["--prot", "1"], "--prot is not a flag; did you mean --port?"),
        (["--xyzzy"], "--xyzzy is not a flag; --help lists all."),
        (["models"], "models is not a flag"),
        (["--port"], "Argument --port: expected one argument"),
    ],
)
def test_each_problem_is_one_sentence(arguments: list[str], message: str) -> None:
    (problem,) = problems(*arguments)
    assert message in problem
    assert "\n" not in problem
    assert problem.endswith((".", "?"))


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_PROT", "1")
    monkeypatch.setenv("PERCEIVER_PORT", "x")
    assert [problem.split()[0] for problem in problems("--max-pixels", "0")] == [
        "PERCEIVER_PROT",
        "PERCEIVER_PORT",
        "PERCEIVER_MAX_PIXELS",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("PERCEIVER_MAX_BATCHSIZE", "did you mean PERCEIVER_MAX_BATCH_SIZE?"),
        ("PERCEIVER_API_KEY", "did you mean PERCEIVER_API_KEYS?"),
        ("perceiver_prot", "did you mean PERCEIVER_PORT?"),
        ("PERCEIVER_ZZZ", "--help lists all."),
    ],
)
def test_a_misspelt_variable_does_not_pass_silently(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv(name, "1")
    (problem,) = problems()
    assert problem.startswith(f"{name} is not a setting; ")
    assert problem.endswith(message)


def test_the_variables_of_a_kubernetes_service_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_PORT", "tcp://10.0.0.7:8000")
    for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"PERCEIVER_{name}", "10.0.0.7")
    (problem,) = problems()
    assert "come from a Kubernetes Service that is called perceiver: set enableServiceLinks: false" in problem


def test_keys_are_never_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERCEIVER_ADMIN_KEY", "hush hush")
    monkeypatch.setenv("PERCEIVER_API_KEYS", "secret one,b")
    text = " ".join(problems())
    assert "printable ASCII" in text
    assert "hush" not in text
    assert "secret" not in text
    monkeypatch.setenv("PERCEIVER_ADMIN_KEY", "hush")
    monkeypatch.setenv("PERCEIVER_API_KEYS", "secret")
    assert "hush" not in repr(load_settings([]))
    assert "secret" not in repr(load_settings([]))
    (tmp_path / "keys").write_text("not a good one\n")
    (problem,) = problems("--api-keys-file", str(tmp_path / "keys"))
    assert "good" not in problem


def test_a_key_file_without_a_key_does_not_open_the_service(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n\n")
    (problem,) = problems("--api-keys-file", str(tmp_path / "keys"))
    assert "holds no key, which would leave the service open" in problem


def test_a_key_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xff\xfe\xfd")
    (problem,) = problems("--api-keys-file", str(tmp_path / "keys"))
    assert "can't be read as text" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# later\n", "holds no key, so reloading over HTTP would be off"),
        (b"\xff\xfe", "can't be read as text"),
        (b"two words", "is not printable ASCII without spaces"),
    ],
)
def test_an_admin_key_file_without_a_key_is_refused_at_the_start(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "key").write_bytes(content)
    (problem,) = problems("--admin-key-file", str(tmp_path / "key"))
    assert message in problem


def test_a_key_may_hold_what_begins_a_comment_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\ntr#sJ9kQ2\nother # of the proxy\n  #none\n")
    assert Settings(api_keys_file=tmp_path / "keys").client_keys() == ("tr#sJ9kQ2", "other")


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\r\ntwo\r\n", encoding="utf-8-sig")
    assert Settings(api_keys_file=tmp_path / "keys").client_keys() == ("one", "two")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1
