"""A module as a folder that any ONNX tool opens, and back: exact, weights in the files that they were in."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from qeff_ir.errors import PackageError, QeffError
from qeff_ir.ir.module import METADATA_KEY, Module
from qeff_ir.ir.verifier import check_order
from qeff_ir.reading import files_below
from qeff_ir.replacement import building, building_file, real_place
from qeff_ir.sharing import WEIGHTS
from qeff_ir.storage import load_model, save_model, tensors

MODEL_FILE = "model.onnx"


def save_module(
    module: Module, folder: Path, filename: str = MODEL_FILE, *, weights: str = WEIGHTS, prefer_links: bool = False
) -> Path:
    """Write a module with its facts, and its weights beside it; arguments are those of `qeff_ir.storage.save_model`.

    Returns:
        Path of the ONNX file.

    Raises:
        PackageError: A weight file is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module.write_facts()
    save_model(module.model, folder, filename, weights=weights, prefer_links=prefer_links)
    return folder / filename


def write_module(module: Module, out: Path) -> Path:
    """Write a module as a folder, or as an ONNX file with a folder of weights: whole, or not at all.

    Args:
        module: The module.
        out: The folder; or the file, if its name ends so. A module that was there before is replaced.

    Returns:
        Path of the ONNX file.

    Raises:
        PackageError: There is something else in its place, or the disk is full, fails or cannot be written.
    """
    if out.suffix == ".onnx":
        with building_file(out, _is_saved) as (partial, weights):
            save_module(module, partial, real_place(out).name, weights=weights)
        return out
    with building(out, _is_snapshot, "a folder of qeff opt alone") as partial:
        save_module(module, partial)
    return out / MODEL_FILE


def _is_saved(path: Path) -> bool:
    """Whether an ONNX file is a module of ours."""
    return _referred(path) is not None


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder holds a saved module and nothing else."""
    referred = _referred(folder / MODEL_FILE)
    files = {path.relative_to(folder).as_posix() for path in files_below(folder)}
    return referred is not None and files == {MODEL_FILE, *referred}


def _referred(path: Path) -> set[str] | None:
    """The files that a saved module refers to; `None` if that is no saved module."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf has an exception class for each of its implementations
        return None
    if not any(p.key == METADATA_KEY for p in proto.metadata_props):
        return None
    return {str(t.location) for t, _ in tensors(ir.from_proto(proto)) if isinstance(t, ir.ExternalTensor)}


def load_module(path: Path, content: bytes | None = None) -> Module:
    """Read what `save_module` wrote.

    Args:
        path: The ONNX file.
        content: What it holds, where that was read already.

    Raises:
        PackageError: A weight file is missing, too short, or outside the file's folder; or it is not an ONNX file.
        VerificationError: The file carries no module of this version, or one whose nodes are out of order.
    """
    module = Module.with_facts(read_model(path, content))
    check_order(module)
    return module


def load_both(path: Path) -> tuple[Module, bytes]:
    """What `load_module` reads, and the bytes of the file: a runtime that takes those reads it no second time.

    Raises:
        PackageError: See `load_module`.
        VerificationError: See `load_module`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path} is not an ONNX file that can be read ({type(error).__name__})") from error
    return load_module(path, content), content


def read_model(path: Path, content: bytes | None = None) -> ir.Model:
    """Read an ONNX file; see `qeff_ir.storage.load_model`.

    Raises:
        PackageError: It cannot be read.
    """
    try:
        return load_model(path, content)
    except QeffError:
        raise
    except Exception as error:  # protobuf has an exception class for each of its implementations
        raise PackageError(f"{path} is not an ONNX file that can be read ({type(error).__name__})") from error
