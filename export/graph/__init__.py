"""The float32 graph: the trained model, folded by exact algebra and translated to ONNX."""
