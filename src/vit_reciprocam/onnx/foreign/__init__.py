"""ONNX graphs from anywhere: read as a Vision Transformer, and explained by nodes beside theirs."""
