"""Export a PyTorch classifier and its maps as one ONNX file."""
