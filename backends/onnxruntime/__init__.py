"""The embedded default: ONNX Runtime on the CPU."""

from __future__ import annotations

from backends.onnxruntime.backend import BACKEND

__all__ = ["BACKEND"]
