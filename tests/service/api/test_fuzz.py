"""Mutated real files of every format, and mutated bodies: what was promised or an error with a 4xx, and nothing else.

The few of CI find what breaks with every other file; `python -m tests.chaos fuzz` tries 100,000 of each. Files that
once broke something are kept in `corpus/` and tried each time.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.service.mutation import BODIES, Edit, decode, mutate, parse, variants

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())

# Pillow warns of odd metadata; the service logs that, and here warnings would be errors of its parsers.
pytestmark = pytest.mark.filterwarnings("ignore")
fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])

EDITS = st.lists(
    st.tuples(st.sampled_from(["replace", "insert", "delete", "cut"]), st.integers(0, 2000), st.binary(max_size=8)),
    max_size=6,
)


@fuzz
@given(st.sampled_from(list(variants().values())), EDITS)
def test_the_decoder(data: bytes, edits: list[Edit]) -> None:
    decode(mutate(data, edits))


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_the_decoder_on_files_that_once_broke_something(path: Path) -> None:
    decode(path.read_bytes())


@fuzz
@given(st.sampled_from(list(BODIES.values())), EDITS, EDITS)
@example(("multipart/form-data; boundary=b", b"--b--\r\n"), [], [])
def test_bodies(body: tuple[str, bytes], of_type: list[Edit], of_body: list[Edit]) -> None:
    parse(mutate(body[0].encode(), of_type[:1]), mutate(body[1], of_body))
