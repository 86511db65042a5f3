"""What the README shows is what the shipped model answers."""

import json
import re

import pytest

from tests.end_to_end.process import ROOT, started

README = (ROOT / "README.md").read_text()
COMMAND = "curl -F file=@docs/apple.png localhost:8000/predict"


@pytest.mark.smoke
def test_the_first_answer_is_the_one_in_the_readme(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rounded: the last digits are the processor's."""
    shown = README.partition(COMMAND)[2].partition("##")[0]
    version = int(re.search(r'"version":(\d+)', shown)[1])  # type: ignore[index]
    (entry,) = [json.loads(entry) for entry in re.findall(r'\{"label".*?\}', shown)]
    unfamiliarity = float(re.search(r'"unfamiliarity":([0-9.]+)', shown)[1])  # type: ignore[index]
    with started(tmp_path_factory.mktemp("readme"), "--provider", "cpu") as process, process.ready() as client:
        answer = client.post("/predict", files={"file": ("apple.png", (ROOT / "docs/apple.png").read_bytes())}).json()
    assert (answer["model"], answer["version"]) == ("perceiver-cifar100", version)
    (image,) = answer["predictions"]
    assert (image["top"][0]["label"], image["top"][0]["index"]) == (entry["label"], entry["index"])
    assert image["top"][0]["probability"] == pytest.approx(entry["probability"], abs=0.02)
    assert image["unfamiliarity"] == pytest.approx(unfamiliarity, abs=0.05)
    assert not image["unfamiliar"]
