"""A module as a folder that any ONNX tool opens, and back: exact, weights by reference."""

from __future__ import annotations

from pathlib import Path

from qeff_ir.module import Module
from qeff_ir.storage import load_model, save_model

MODEL_FILE = "model.onnx"


def save_module(module: Module, folder: Path, filename: str = MODEL_FILE) -> Path:
    """Write a module with its facts; weights that lie in files are hard-linked beside it.

    Returns:
        Path of the ONNX file.

    Raises:
        PackageError: A weight file is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module.write_facts()
    save_model(module.model, folder, filename)
    return folder / filename


def load_module(path: Path) -> Module:
    """Read what `save_module` wrote.

    Args:
        path: The ONNX file.

    Raises:
        PackageError: A weight file is missing, too short, or outside the file's folder.
        VerificationError: The file carries no module of this version.
    """
    return Module.with_facts(load_model(path))
