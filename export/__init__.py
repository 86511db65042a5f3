"""Export: a trained run becomes a model folder that the service can serve, behind a gate that proves it is the same."""

import service  # noqa: F401 - before onnxruntime, which it keeps from telling its maker
