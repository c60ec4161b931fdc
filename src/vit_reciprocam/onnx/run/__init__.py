"""Run explained ONNX files in ONNX Runtime or OpenVINO."""
