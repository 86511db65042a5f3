"""The Open Inference Protocol v2 over HTTP, as KServe and Triton speak it."""
