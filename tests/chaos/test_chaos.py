"""A bounded run of the chaos client; `python -m tests.chaos misuse` sends 10,000."""

import asyncio
from pathlib import Path

from tests.chaos.client import MISDEEDS, rampage
from tests.chaos.service import LIMITS, Vitals
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder


def test_the_service_survives_misuse_and_is_as_it_was(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", *LIMITS)) as process, process.ready() as client:
        address = (client.base_url.host, client.base_url.port or 0)
        asyncio.run(rampage(*address, requests=100, concurrency=16, seed=1))
        before = Vitals.of(process, client)
        report = asyncio.run(rampage(*address, requests=400, concurrency=32, seed=0))
        assert report.surprises == []
        assert {kind for kind, _ in report.answers} == set(MISDEEDS)
        assert sum(count for (_, status), count in report.answers.items() if status == 200) > 50
        assert before.complaints(Vitals.of(process, client)) == []
        process.signal()
        assert process.exit_status() == 0
