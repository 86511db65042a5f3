"""python -m tests.chaos.slow_service: the service, on a device whose every run takes CHAOS_RUN_MS milliseconds.

What it can do at most then depends on the device and not on the cores, as with a GPU.
"""

import os
import runpy
import time

from service import versions
from service.engine import OnnxEngine
from tests.fakes import Images, Logits

MODULE = "tests.chaos.slow_service"
VARIABLE = "CHAOS_RUN_MS"


class SlowEngine(OnnxEngine):
    """The model itself, after a wait that costs no CPU time."""

    def run(self, images: Images) -> Logits:
        time.sleep(float(os.environ[VARIABLE]) / 1000)
        return super().run(images)


if __name__ == "__main__":
    versions.OnnxEngine = SlowEngine  # type: ignore[misc]
    runpy.run_module("service", run_name="__main__")
