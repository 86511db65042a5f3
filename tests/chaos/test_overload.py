"""A short overload in CI. `python -m tests.chaos overload` holds the promises in milliseconds, on an idle machine.

Nothing is timed here, since the cores of CI are shared: instead of milliseconds, the answers that others got meanwhile
are counted. The device takes 160 ms a run, so that its rate is that of a clock and not that of a core.
"""

from pathlib import Path

import pytest

from tests.chaos.overload import Target, overload, unexpected
from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder

BATCH, QUEUE = 8, 64


@pytest.mark.serial
def test_overload_costs_those_who_are_turned_away_and_nobody_else(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", f"--max-batch-size={BATCH}", f"--max-queue-size={QUEUE}", "--max-images=8")
    with started(tmp_path, *arguments, module=MODULE, **{VARIABLE: "160"}) as process, process.ready() as client:
        target = Target(client.base_url.host, client.base_url.port or 0, BATCH, QUEUE)
        seen = overload(target, factor=5, seconds=6, calibration_s=3)
        print(seen)
        assert unexpected(seen.outcomes) == []
        # Nobody who was let in waited for more than a full queue and the batch that ran.
        assert seen.overtaken.max() <= QUEUE + 2 * BATCH
        # Nobody who was turned away waited in the queue for it.
        assert seen.rejected_meanwhile.max() <= QUEUE // 2
        # Turning others away did not cost the model its time; an idle machine loses no tenth, this one may be busy.
        assert seen.goodput > 0.75 * seen.maximum
        process.signal()
        assert process.exit_status() == 0
