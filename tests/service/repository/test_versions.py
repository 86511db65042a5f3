"""Engines for the devices of a version, and how its faults are public."""

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.engine.session import EngineError
from service.repository import versions as versions_module
from service.repository.versions import VersionRecord, open_engines, scan, without_folders
from service.settings import Settings
from tests.fakes import FakeEngine, make_model_folder, tiny_images, tiny_logits


class DeviceEngine(FakeEngine):
    """An engine on a device that may not be there."""

    made: list["DeviceEngine"] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, path: Path, *, provider: str, device_id: int = 0, **options: object) -> None:
        super().__init__()
        if device_id == 7:
            raise EngineError("CUDA device 7 can't be opened")
        self.device_id = device_id
        self.options = options
        self.made.append(self)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[DeviceEngine]:
    monkeypatch.setattr(versions_module, "resolve_provider", lambda choice, device_id: "cuda")
    monkeypatch.setattr(versions_module, "OnnxEngine", DeviceEngine)
    DeviceEngine.made.clear()
    return DeviceEngine.made


def test_each_gpu_gets_an_engine(devices: list[DeviceEngine], tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    options = Settings(
        device_ids=(0, 2), max_batch_size=16, gpu_memory_limit_bytes=2**30, cuda_graphs=False, tune_batch_size=True
    )
    assert [engine.device_id for engine in devices] == []
    assert open_engines(folder, options) == devices
    assert [engine.device_id for engine in devices] == [0, 2]
    assert devices[0].options == {
        "max_batch_size": 16,
        "intra_op_threads": 0,
        "gpu_memory_limit_bytes": 2**30,
        "cuda_graphs": False,
        "tune_batch_size": True,
    }


def test_if_one_gpu_fails_the_engines_on_the_others_are_closed(devices: list[DeviceEngine], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="CUDA device 7"):
        open_engines(make_model_folder(tmp_path), Settings(device_ids=(0, 1, 7)))
    assert [engine.closed for engine in devices] == [True, True]


@pytest.mark.parametrize(
    ("cores", "engines", "asked", "threads"),
    [
        (1, 0, 0, [0]),
        (2, 0, 0, [1, 1, 0]),  # the last has all of them
        (3, 0, 0, [1, 1, 1, 0]),
        (6, 0, 0, [1, 1, 1, 1, 0]),
        (9, 0, 0, [2, 2, 2, 2, 0]),
        (6, 0, 6, [6]),
        (6, 1, 0, [0]),
        (6, 1, 2, [2]),
        (6, 2, 0, [3, 3, 0]),
        (6, 8, 0, [1] * 8 + [0]),
        (1, 2, 0, [1, 1]),
        (6, 2, 5, [5, 5]),
    ],
)
def test_engines_on_the_cpu_share_its_cores(
    cores: int, engines: int, asked: int, threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions_module, "OnnxEngine", DeviceEngine)
    monkeypatch.setattr(versions_module, "usable_cores", lambda: cores)
    DeviceEngine.made.clear()
    options = Settings(
        provider="cpu", device_ids=(5, 6), cpu_engines=engines, intra_op_threads=asked, tune_batch_size=True
    )
    opened = open_engines(make_model_folder(tmp_path), options)
    assert opened == DeviceEngine.made
    assert [engine.options["intra_op_threads"] for engine in DeviceEngine.made] == threads
    for engine, number in zip(DeviceEngine.made, threads, strict=True):
        runs_alone = len(threads) > 1 and number == 0
        assert engine.options.get("runs_alone", False) == runs_alone
        assert engine.options["max_batch_size"] == (1 if runs_alone else 32)
        assert engine.options["tune_batch_size"] != runs_alone


def test_engines_on_the_cpu_are_real_and_give_the_same_answers(tmp_path: Path) -> None:
    engines = open_engines(make_model_folder(tmp_path), Settings(provider="cpu", cpu_engines=2))
    image = tiny_images(1)
    assert [engine.runs_alone for engine in engines[:2]] == [False, False]
    for engine in engines:
        np.testing.assert_allclose(engine.run(image), tiny_logits(image, 1), atol=1e-4)


def test_a_gpu_ignores_cpu_engines(devices: list[DeviceEngine], tmp_path: Path) -> None:
    assert len(open_engines(make_model_folder(tmp_path), Settings(cpu_engines=4))) == 1
    assert devices[0].options["intra_op_threads"] == 0


# What a client may read


@pytest.mark.parametrize(
    ("reason", "public"),
    [
        ("/srv/my models/2/model.onnx: can't be read", "2/model.onnx: can't be read"),
        ("Load model from /srv/my models/2/model.onnx failed", "Load model from 2/model.onnx failed"),
        ("/onnxruntime_src/core/graph/model.cc:169 Model::Model(x)", "model.cc:169 Model::Model(x)"),
        (
            "Failed to load library (/opt/venv/lib/libcudnn.so.9), '/etc/x'",
            "Failed to load library (libcudnn.so.9), 'x'",
        ),
        (
            "2/golden.npz: 3/4 of them, see https://host/docs/page",
            "2/golden.npz: 3/4 of them, see https://host/docs/page",
        ),
    ],
)
def test_a_reason_has_no_absolute_path(reason: str, public: str) -> None:
    assert without_folders(reason, Path("/srv/my models")) == public


def test_nor_where_the_model_folder_is_a_relative_path_or_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "link", tmp_path / "real", Path("link")):
        assert without_folders(f"{folder}/2/x: no; {tmp_path}/real/2/y: no", Path("link")) == "2/x: no; 2/y: no"


@pytest.mark.parametrize(("error", "passes"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_an_error_that_passes_is_no_change_of_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, passes: bool
) -> None:
    make_model_folder(tmp_path)
    iterdir = Path.iterdir

    def failing(folder: Path) -> Iterator[Path]:
        if folder != tmp_path:
            raise OSError(error, "failing", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", failing)
    if passes:
        with pytest.raises(OSError, match="failing"):
            scan(tmp_path)
    else:  # it is there, and refused when its turn comes
        assert [fingerprint for _, fingerprint in scan(tmp_path)] == [()]


def test_a_link_to_itself_breaks_its_version_alone(tmp_path: Path) -> None:
    """As `ln -s model.onnx 2/model.onnx` makes it, by mistake."""
    make_model_folder(tmp_path)
    link = tmp_path / "2" / "model.onnx"
    link.parent.mkdir()
    link.symlink_to(link.name)
    (_, whole), (second, nothing) = scan(tmp_path)
    assert len(whole) == 2
    assert (second.number, nothing) == (2, ())


def test_a_version_that_can_not_be_read_is_refused_alone_and_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path)
    ((version, before),) = scan(tmp_path)

    def failing(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", failing)
    record = VersionRecord(version, before)
    record.describe(Settings(), "cpu")
    assert (record.state, record.metadata) == ("refused", None)
    assert "Permission denied" in record.public_reason
    # It remains a candidate and is read again, since the error may pass.
    assert record.reason == ""
    assert "version 1: can't be read: " in caplog.text
    caplog.clear()
    record.describe(Settings(), "cpu")
    assert caplog.text == ""  # once, and not at every poll
    monkeypatch.undo()
    record.describe(Settings(), "cpu")
    assert (record.state, record.public_reason) == ("available", "")
    assert record.metadata is not None


def test_corrected_rights_are_a_change_of_refused_versions_alone(tmp_path: Path) -> None:
    """It is tried again; what serves is not loaded anew for a chmod, or for the hard link of a backup."""
    model = make_model_folder(tmp_path) / "model.onnx"
    ((version, before),) = scan(tmp_path)
    model.chmod(0o600)
    ((_, after),) = scan(tmp_path)
    assert not VersionRecord(version, before, reason="can't be read").matches(after)
    assert VersionRecord(version, before, serving=True).matches(after)
    model.write_bytes(b"junk")
    ((_, changed),) = scan(tmp_path)
    assert not VersionRecord(version, before, serving=True).matches(changed)
