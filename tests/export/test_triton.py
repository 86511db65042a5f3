"""config.pbtxt: read by the parser of a grammar that knows Triton's fields and no others."""

import re
from pathlib import Path
from typing import Any

from export.triton import CONFIG_FILE, triton_config, write_triton_config
from service.engine.session import read_metadata
from service.repository.folder import list_versions
from tests.fakes import CLASSES, HEIGHT, WIDTH, make_model_folder, tiny_metadata

ROOT = Path(__file__).parents[2]
# Of model_config.proto: fields of each message used here, with the message or the type that they hold.
FIELDS: dict[str, dict[str, str]] = {
    "config": {
        "platform": "string",
        "max_batch_size": "int",
        "input": "tensor",
        "output": "tensor",
        "dynamic_batching": "batching",
        "instance_group": "group",
    },
    "tensor": {"name": "string", "data_type": "enum", "dims": "int"},
    "batching": {"preferred_batch_size": "int"},
    "group": {"count": "int", "kind": "enum"},
}
TOKEN = re.compile(r'\s*(?:#[^\n]*\n\s*)*("[^"]*"|[A-Za-z_]\w*|\d+|[\[\]{}:,])')


def tokens(text: str) -> list[str]:
    found, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        assert match, text[at : at + 40]
        found.append(match[1])
        at = match.end()
    return found


def parse(text: str) -> dict[str, Any]:
    stream = tokens(text)
    message = read_message(stream, "config")
    assert not stream
    return message


def read_message(stream: list[str], kind: str) -> dict[str, Any]:
    message: dict[str, Any] = {}
    while stream and stream[0] != "}":
        name = stream.pop(0)
        assert name in FIELDS[kind], f"{kind} has no {name}"
        assert name not in message
        if stream[0] == ":":
            stream.pop(0)
        message[name] = read_list(stream, FIELDS[kind][name])
    return message


def read_list(stream: list[str], kind: str) -> Any:
    if stream[0] != "[":
        return read_value(stream, kind)
    stream.pop(0)
    values = [read_value(stream, kind)]
    while stream[0] == ",":
        stream.pop(0)
        values.append(read_value(stream, kind))
    assert stream.pop(0) == "]"
    return values


def read_value(stream: list[str], kind: str) -> Any:
    token = stream.pop(0)
    if kind in FIELDS:
        assert token == "{"
        message = read_message(stream, kind)
        assert stream.pop(0) == "}"
        return message
    if kind == "int":
        return int(token)
    assert token.startswith('"') == (kind == "string")
    return token.strip('"')


def test_the_file_says_what_the_metadata_say() -> None:
    config = parse(triton_config(tiny_metadata()))
    assert config["platform"] == "onnxruntime_onnx"
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [HEIGHT, WIDTH, 3]}]
    assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [CLASSES]}]
    assert max(config["dynamic_batching"]["preferred_batch_size"]) <= config["max_batch_size"]
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_AUTO"}]
    assert "name" not in config  # Triton takes the folder's


def test_the_service_sees_the_versions_and_not_the_file(tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    write_triton_config(tmp_path, tiny_metadata())
    write_triton_config(tmp_path, tiny_metadata(labels=("a", "b")))
    assert parse((tmp_path / CONFIG_FILE).read_text())["output"][0]["dims"] == [2]
    assert [version.number for version in list_versions(tmp_path)] == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"1", CONFIG_FILE}


def test_a_file_that_somebody_changed_is_left_as_it_is(tmp_path: Path) -> None:
    assert write_triton_config(tmp_path, tiny_metadata()) is None
    path = tmp_path / CONFIG_FILE
    own = path.read_text().split("\n", 1)[1].replace("count: 1", "count: 2")
    path.write_text(own)
    complaint = write_triton_config(tmp_path, tiny_metadata(labels=("a", "b")))
    assert complaint is not None
    assert f"{path}: not changed" in complaint
    assert path.read_text() == own


def test_a_file_of_an_earlier_version_of_the_command_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("# Written by `python -m export` from the metadata of the model.\nold: 1\n")
    assert write_triton_config(tmp_path, tiny_metadata()) is None
    assert (tmp_path / CONFIG_FILE).read_text() == triton_config(tiny_metadata())


def test_where_it_cannot_be_written_a_sentence_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    complaint = write_triton_config(tmp_path, tiny_metadata())
    assert complaint is not None
    assert "Triton needs it, the service does not" in complaint
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_FILE]


def test_the_shipped_models_file_is_up_to_date() -> None:
    folder = ROOT / "models" / "perceiver-cifar100"
    metadata = read_metadata(list_versions(folder)[-1].path / "model.onnx")
    assert (folder / CONFIG_FILE).read_text() == triton_config(metadata)
