"""The shipped model, explained over HTTP: two images side by side, and the map of each label lies on its half."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from service.repository.folder import GOLDEN_FILE, Golden, list_versions, load_golden
from tests.end_to_end.process import ROOT, started
from tests.imaging.files import encode

MODEL = ROOT / "models" / "perceiver-cifar100"
PAIRS = 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    arguments = ("--model-dir", str(MODEL), "--provider", "cpu", "--request-timeout-ms", "600000")
    with started(tmp_path_factory.mktemp("service"), *arguments) as process, process.ready() as client:
        client.timeout = httpx.Timeout(600)
        yield client


def surest(golden: Golden) -> list[int]:
    """The golden images that the model knows, the surest first, one of each class."""
    exponentials = np.exp(golden.logits - golden.logits.max(axis=1, keepdims=True))
    probabilities = exponentials.max(axis=1) / exponentials.sum(axis=1)
    ranked = [i for i in np.argsort(-probabilities) if golden.logits[i].argmax() == golden.labels[i]]
    return list({int(golden.labels[i]): int(i) for i in reversed(ranked)}.values())[::-1]


@pytest.mark.parametrize("pair", range(PAIRS))
def test_the_map_of_each_label_lies_on_its_half(client: httpx.Client, pair: int) -> None:
    golden = load_golden(list_versions(MODEL)[-1].path / GOLDEN_FILE)
    labels = client.get("/models").json()["versions"][-1]["metadata"]["labels"]
    numbers = surest(golden)[2 * pair : 2 * pair + 2]
    height, width = golden.images.shape[1:3]
    halves = [np.asarray(Image.fromarray(golden.images[number]).resize((width // 2, height))) for number in numbers]
    file = encode(np.concatenate(halves, axis=1), "PNG")
    for own, number in enumerate(numbers):
        label = labels[golden.labels[number]]
        answer = client.post("/explain", params={"label": label}, content=file, headers={"content-type": "image/png"})
        (explanation,) = answer.json()["explanations"]
        assert explanation["label"] == label
        falls = [half.mean() for half in np.hsplit(np.array(explanation["map"]), 2)]
        assert falls[own] > falls[1 - own], label


def test_the_shipped_image_is_drawn_with_its_map(client: httpx.Client, tmp_path: Path) -> None:
    image = (ROOT / "docs" / "apple.png").read_bytes()
    answer = client.post("/explain", content=image, headers={"content-type": "image/png", "accept": "image/png"})
    (tmp_path / "map.png").write_bytes(answer.content)
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.format == "PNG"
