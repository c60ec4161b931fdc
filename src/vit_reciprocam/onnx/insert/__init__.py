"""Maps inserted into an ONNX file that any exporter wrote."""
