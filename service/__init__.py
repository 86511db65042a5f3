"""The HTTP service: images in, labels out. onnxruntime and no torch."""

import os

# onnxruntime's builds tell its maker how they are used, and on what machine. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
