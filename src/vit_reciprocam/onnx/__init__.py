"""Explanations in ONNX: files that give prediction and maps, and their runtime."""
