"""A few files that are made to cost much, and a few mutants; `python -m tests.chaos` sends all, and judges times."""

from pathlib import Path

from tests.chaos.costly import SETTINGS, costly
from tests.chaos.fuzz import SETTINGS as FUZZED
from tests.chaos.fuzz import fuzz
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder

NAMES = ["PNG, 49 million pixels with alpha", "TIFF, one tile of 7040 x 7040 for 16 x 16"]


def test_what_costs_much_is_bounded_and_others_are_served(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", *SETTINGS)) as process, process.ready() as client:
        address = (client.base_url.host, client.base_url.port or 0)
        assert costly(address, process.popen.pid, 0.1, NAMES) == []
        assert client.get("/health/ready").status_code == 200
        process.signal()
        assert process.exit_status() == 0


def test_mutants_of_each_format_are_decoded_or_refused_within_the_limits() -> None:
    findings = fuzz("mutants", 300, seed=0)
    assert findings.surprises == []
    assert {kind for kind, _ in findings.outcomes} == set(FUZZED.image_formats)
