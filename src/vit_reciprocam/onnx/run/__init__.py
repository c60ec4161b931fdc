"""Explained ONNX files, run by ONNX Runtime or OpenVINO."""
