"""Passes that only this target needs: the fused kernels of ONNX Runtime."""
