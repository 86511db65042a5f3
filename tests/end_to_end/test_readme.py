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
    entries = [json.loads(entry) for entry in re.findall(r'\{"label".*?\}', shown)]
    assert len(entries) == 2
    with started(tmp_path_factory.mktemp("readme"), "--provider", "cpu") as process, process.ready() as client:
        answer = client.post("/predict", files={"file": ("apple.png", (ROOT / "docs/apple.png").read_bytes())}).json()
    assert (answer["model"], answer["version"]) == ("perceiver-cifar100", version)
    for entry, got in zip(entries, answer["predictions"][0]["top"], strict=False):
        assert (got["label"], got["index"]) == (entry["label"], entry["index"])
        assert got["probability"] == pytest.approx(entry["probability"], abs=0.02)
