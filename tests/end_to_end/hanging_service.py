"""python -m tests.end_to_end.hanging_service: the service, with workers whose event loop SIGUSR1 stops for good."""

import runpy
import signal
import time

from service import launcher

MODULE = "tests.end_to_end.hanging_service"

if __name__ == "__mp_main__":  # in a worker
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(10**6))
if __name__ == "__main__":
    launcher.HEALTH_CHECK_TIMEOUT_S = 10  # type: ignore[misc]
    runpy.run_module("service", run_name="__main__")
