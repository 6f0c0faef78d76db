"""Writing a model to a folder without copying its weights: files of a checkpoint are hard-linked, changed tensors written
once, one at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from qeff_ir.errors import PackageError

WEIGHTS = "weights"
"""Folder of the weight files, beside the ONNX file; ONNX takes only paths below its own folder."""

_INLINE_BYTES = 1024
"""Tensors up to this size stay inside the ONNX file, as constants do in the AI 100 contract (§8)."""


def save_model(model: ir.Model, folder: Path, filename: str) -> None:
    """Write ``folder/filename`` and what it refers to under ``folder/weights``; `model` itself is unchanged.

    Tensors that lie in files (a checkpoint's safetensors) are referenced through a hard link, or a copy where the folder
    is on another file system. All others above 1 KiB go to one side file, one at a time.

    Raises:
        PackageError: A referenced file is gone.
    """
    copy = model.clone()
    links: dict[Path, str] = {}
    loose: list[ir.Value] = []
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = _link(Path(tensor.path), folder, links)
            value.const_value = ir.ExternalTensor(
                location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.dims),
                name=value.name or "",
                base_dir=folder,
            )
        elif tensor is not None and tensor.nbytes > _INLINE_BYTES:
            loose.append(value)
    if loose:
        side = f"{WEIGHTS}/{Path(filename).stem}.data"
        (folder / WEIGHTS).mkdir(parents=True, exist_ok=True)
        tensors = [v.const_value for v in loose if v.const_value is not None]
        written = ir.external_data.convert_tensors_to_external(tensors, folder, side)
        for value, tensor in zip(loose, written, strict=True):
            value.const_value = tensor
    ir.save(copy, folder / filename)


def _link(source: Path, folder: Path, links: dict[Path, str]) -> str:
    """Make `source` reachable below `folder`; returns its location relative to the folder."""
    if not source.exists():
        raise PackageError(f"the weight file {source} is gone: restore it, or lower the model again")
    if source not in links:
        names = set(links.values())
        location = f"{WEIGHTS}/{source.name}"
        for i in range(len(names) + 1):
            if location not in names:
                break
            location = f"{WEIGHTS}/{i}-{source.name}"
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, target)
        links[source] = location
    return links[source]
