"""ONNX Runtime as edgert uses it."""
