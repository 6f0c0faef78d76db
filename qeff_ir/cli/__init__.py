"""The command line: ``qeff compile``, ``run``, ``verify`` and ``demo``; for pass authors ``passes``, ``opt`` and more.

Nothing here imports torch, transformers or onnx before a command needs it, so that help is there at once.
"""

from __future__ import annotations

from qeff_ir.cli.app import main

__all__ = ["main"]
