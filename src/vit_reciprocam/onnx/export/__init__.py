"""A PyTorch classifier exported to ONNX together with its maps."""
