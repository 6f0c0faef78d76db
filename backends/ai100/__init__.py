"""Qualcomm Cloud AI 100: ONNX with the device's own ops, the SDK's compiler, the device or its emulator."""
