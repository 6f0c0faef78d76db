"""A module as a folder that any ONNX tool opens, and back: exact, weights by reference."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qeff_ir.errors import PackageError, QeffError
from qeff_ir.module import Module
from qeff_ir.storage import load_model, save_model
from qeff_ir.verifier import check_order

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
        PackageError: A weight file is missing, too short, or outside the file's folder; or it is not an ONNX file.
        VerificationError: The file carries no module of this version, or one whose nodes are out of order.
    """
    module = Module.with_facts(read_model(path))
    check_order(module)
    return module


def read_model(path: Path) -> ir.Model:
    """Read an ONNX file; see `qeff_ir.storage.load_model`.

    Raises:
        PackageError: It cannot be read.
    """
    try:
        return load_model(path)
    except QeffError:
        raise
    except Exception as error:  # protobuf has an exception class for each of its implementations
        raise PackageError(f"{path} is not an ONNX file that can be read ({type(error).__name__})") from error
