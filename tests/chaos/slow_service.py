"""python -m tests.chaos.slow_service: the service, on a device whose every run takes CHAOS_RUN_MS milliseconds.

What it can do at most then depends on the device and not on the cores, as with a GPU. A batch with the image POISON
in it raises.
"""

import os
import runpy
import time

import numpy as np

from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import Outputs
from service.engine.session import EngineError
from service.repository import versions
from tests.fakes import HEIGHT, WIDTH, Images

MODULE = "tests.chaos.slow_service"
VARIABLE = "CHAOS_RUN_MS"
POISON = np.full((HEIGHT, WIDTH, 3), (255, 0, 255), np.uint8)


class SlowEngine(OnnxEngine):
    """The model itself, after a wait that costs no CPU time."""

    def run_outputs(self, images: Images, *, with_features: bool = False) -> Outputs:
        time.sleep(float(os.environ[VARIABLE]) / 1000)
        if any(np.array_equal(image, POISON) for image in images):
            raise EngineError("the device says no")
        return super().run_outputs(images, with_features=with_features)


if __name__ in ("__main__", "__mp_main__"):  # the latter in a worker
    os.environ["PERCEIVER_TUNE_BATCH_SIZE"] = "false"  # its batches are as large as the tests say
    versions.OnnxEngine = SlowEngine  # type: ignore[misc]
if __name__ == "__main__":
    runpy.run_module("service", run_name="__main__")
