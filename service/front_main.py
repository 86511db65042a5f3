"""python -m service.front_main: begin a process that speaks HTTP; `service.front_start` does this.

Its end is the affair of the process that runs the model. Who signals every process of the service, as systemd does,
must not meet one that is deaf only when all is imported: so this comes before.
"""

import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    from service.front_process import main

    sys.exit(main(sys.argv[1:]))
