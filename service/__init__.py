"""The HTTP service: pictures in, labels out. onnxruntime and no torch."""
