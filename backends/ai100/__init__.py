"""Qualcomm Cloud AI 100: ONNX with the device's own ops, the SDK's compiler, the device or its emulator."""

from __future__ import annotations

from backends.ai100.backend import BACKEND

__all__ = ["BACKEND"]
