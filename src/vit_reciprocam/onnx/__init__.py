"""Explanations in ONNX: write files that give prediction and maps, and run them."""
