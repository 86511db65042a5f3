"""Export: a trained run becomes a version of a model folder, behind gates that compare it with the trained model."""

import service  # noqa: F401 - before onnxruntime, whose telemetry it turns off
