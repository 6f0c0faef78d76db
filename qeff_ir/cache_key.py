"""The key of a package: a digest of all that can change it, by which an equal one is found again."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backends.base import Backend
from backends.options import CompileOptions
from qeff_ir.digests import digest_file
from qeff_ir.errors import CompileError, ModelLoadError, PackageError
from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import fingerprint
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.ranges import stored_in
from qeff_ir.reading import files_below
from qeff_ir.sharing import choice
from qeff_ir.target_options import as_given

_OWN_PACKAGES = ("qeff_ir", "passes", "backends")
_LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def package_key(
    source: Source,
    lowered: Mapping[str, Module],
    backend: Backend,
    options: CompileOptions,
    steps: Mapping[str, Pipeline],
    emit_only: bool,
    inputs: dict[str, str],
) -> str:
    """SHA-256 of all that can change a package."""
    graph: Any = source.identity()
    if graph is None:
        graph = {name: fingerprint(module) for name, module in lowered.items()}
    weights = {name: _weight_digests(module) for name, module in lowered.items()}
    # In their order and by name: a model that was moved is the same one, shards of two folders are not.
    files = [(Path(name).name, digest) for name, digest in inputs.items()]
    facts = {
        "graph": graph,
        "weights": weights,
        "files": files,
        "weight files": choice(),
        "options": asdict(options),
        "name": source.task.graph_name,
        "flag files": {n: digest_file(Path(v)) for n, v in as_given(options).items() if _is_file(v)},
        "programs": {name: str(pipeline) for name, pipeline in steps.items()},
        "plugins": _plugin_digests(
            [source, source.provider, *(item for pipeline in steps.values() for item in pipeline.passes)]
        ),
        "compiled": not emit_only,
        "target": backend.name,
        "versions": {
            **{n: importlib.metadata.version(n) for n in _LIBRARIES},
            **backend.versions(),
            "code": code_digest(),
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def input_digests(source: Source) -> dict[str, str]:
    """Digest of every file that a package is made from.

    Raises:
        ModelLoadError: A file of the checkpoint cannot be read.
    """
    found: dict[str, str] = {}
    for path in source.weight_files():
        try:
            found[str(path)] = digest_file(path)
        except OSError as error:
            raise ModelLoadError(
                f"the checkpoint file {path} cannot be read ({error.strerror}): open the model again"
            ) from error
    return {**found, **_side_digests(source)}


def refuse_changes(before: dict[str, str], after: dict[str, str]) -> None:
    """Tell of a model that was saved again while it was compiled: what was made is of neither."""
    changed = [name for name in (*before, *after) if before.get(name) != after.get(name)]
    if changed:
        raise PackageError(f"{Path(changed[0]).name} was changed while the model was compiled: compile it again")


def _side_digests(source: Source) -> dict[str, str]:
    """Digests of what a package gets along with the model: a tokenizer or generation defaults may change alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.save_side_files(folder)
        return {str(path.relative_to(folder)): digest_file(path) for path in files_below(folder)}


def _plugin_digests(parts: Iterable[object]) -> dict[str, str]:
    """Digest of the file of each pass, source or provider of others, by module: `code_digest` does not see its code.

    Raises:
        CompileError: A class is in no file.
    """
    classes = {type(part) for part in parts}
    found: dict[str, str] = {}
    for cls in classes:
        if cls.__module__.partition(".")[0] not in _OWN_PACKAGES:
            try:
                found[cls.__module__] = digest_file(Path(inspect.getfile(cls)))
            except (TypeError, OSError) as error:
                raise CompileError(
                    f"the code of {cls.__qualname__} is in no file, by which packages could be told apart: put it "
                    "into a module"
                ) from error
    return found


def _is_file(value: object) -> bool:
    try:
        return isinstance(value, str | Path) and Path(value).is_file()
    except (OSError, ValueError):  # a text that no file has for a name
        return False


def _weight_digests(module: Module) -> dict[str, str]:
    """Digest of each weight, read one at a time."""
    found: dict[str, str] = {}
    for name, value in module.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and WEIGHT_KEY in value.metadata_props and stored_in(tensor) is None:
            found[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return found


@functools.cache
def code_digest() -> str:
    """Digest of the compiler's own source, so that a changed pass never meets an old package."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in _OWN_PACKAGES:
        for path in files_below(root / package, "*.py") + files_below(root / package, "*.json"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
