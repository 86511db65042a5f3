"""What every test needs."""

import signal

import hypothesis

# A shell that starts the tests in the background (`make test &`) has SIGINT ignored, and processes that tests start and
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nor is the time of an example of hypothesis a test: 200 ms pass on a machine that others use as well.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
