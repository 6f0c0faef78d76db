"""The embedded default: ONNX Runtime on the CPU."""
