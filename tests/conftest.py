"""What every test needs."""

import signal

# A shell that starts the tests in the background (`make test &`) has SIGINT ignored, and processes that tests start and
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
