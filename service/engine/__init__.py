"""One ONNX model on one device: sessions, CUDA, warm-up."""
