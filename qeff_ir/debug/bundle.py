"""One folder for every failure, from which it can be replayed, bisected and reduced.

    BUNDLE/metadata.json              what failed, how, with which versions; written last
    BUNDLE/model.onnx, weights/       the module before the failing pass; large weights are hard links where possible
    BUNDLE/test_data_set_0/*.pb       one run of it, in the layout of the ONNX backend tests
    BUNDLE/start/model.onnx, weights/ the module before the whole pipeline
    BUNDLE/inputs/0/                  what a pass of the pipeline reads, an adapter say

A bundle is data: reading one runs no code of it, and no path in it leads out of its folder, not in its pipeline either.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.debug.drive import Answers
from qeff_ir.errors import BundleError, PipelineError, QeffError
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import MODEL_FILE, load_module, save_module
from qeff_ir.passing.options import options
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.reading import list_folder, parse_json, read_bytes, regular_file

SCHEMA_VERSION = 1
"""Version of ``metadata.json`` and of the folder; a bundle of another version is refused."""
METADATA = "metadata.json"
START = "start"
_SMALL_BYTES = 16 << 20
"""Weights up to this size in all are copied into a bundle."""
DATA_SET = "test_data_set_0"
INPUTS = "inputs"
_CARRIED = frozenset({".json", ".safetensors"})
"""Endings of the files that an adapter is read from."""
_MAX_TRACE_BYTES = 1 << 31
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("pass_id", "pipeline", "suffix", "error", "code", "message"), str),
    **dict.fromkeys(("check", "seed"), int),
    "versions": dict,
}
_LEVELS, _SEEDS = 4, 1 << 32
_LIBRARIES = ("qeff-ir", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Metadata:
    """What a bundle says of its failure.

    Attributes:
        pass_id: Instance id of the failing pass in the whole pipeline.
        pipeline: The whole pipeline as text, options included.
        suffix: The pipeline from the failing pass on.
        check: Check level.
        seed: Of the trace.
        error: Class of the error.
        code: Code of the error or of its cause, where it has one.
        message: The error's text.
        versions: Of qeff-ir and the libraries below it.
        version: Schema version.
    """

    pass_id: str
    pipeline: str
    suffix: str
    check: int
    seed: int
    error: str
    code: str
    message: str
    versions: Mapping[str, str]
    version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read.

    Attributes:
        folder: Where it lies.
        metadata: What it says.
        module: The module before the failing pass.
        start: The module before the pipeline.
    """

    folder: Path
    metadata: Metadata
    module: Module
    start: Module

    @property
    def pipeline(self) -> Pipeline:
        """The whole pipeline; what its passes read lies in the bundle.

        Raises:
            PipelineError: A pass is not known here.
            BundleError: A pass would read outside of the bundle.
        """
        return _moved(Pipeline.parse(self.metadata.pipeline), self._inside)

    @property
    def suffix(self) -> Pipeline:
        """The pipeline from the failing pass on; raises as `pipeline` does."""
        return _moved(Pipeline.parse(self.metadata.suffix), self._inside)

    def _inside(self, place: str) -> str:
        try:
            return str(_inside((self.folder / place).resolve(), self.folder))
        except (OSError, ValueError, RuntimeError, BundleError) as error:
            raise BundleError(
                f"the pipeline of {self.folder} reads '{place}', outside of the bundle: refused"
            ) from error

    def other_versions(self) -> list[tuple[str, str, str]]:
        """Libraries whose version here is another one: name, here, then."""
        then = self.metadata.versions
        return [(n, here, then[n]) for n, here in versions().items() if n in then and then[n] != here]


def describe(error: BaseException) -> tuple[str, str]:
    """Class and code of an error, to be called while it is handled.

    Of the cause where the manager only added the pass to its text; an instrument is told before the two are linked, so
    the exception that is being handled counts as the cause.
    """
    cause = error.__cause__ or sys.exception() or error
    return type(cause).__name__, str(getattr(cause, "code", "") or "")


def versions() -> dict[str, str]:
    """Versions of what can change a failure."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_bundle(folder: Path, metadata: Metadata, module: Module, start: Module, trace: Answers | None) -> Path:
    """Write a bundle that is whole or not there; an older bundle in its place is replaced.

    Args:
        folder: The bundle.
        metadata: What failed.
        module: Before the failing pass.
        start: Before the pipeline.
        trace: One run of `module`; `None` when it cannot run.

    Raises:
        BundleError: The folder holds something else, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder / METADATA).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder} exists and is no bundle: remove it, or choose another --bundle")
    partial = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        save_module(_inlined(module), partial, prefer_links=True)
        save_module(_inlined(start), partial / START, prefer_links=True)
        if trace is not None:
            _write_trace(partial / DATA_SET, trace)
        metadata = _with_inputs(metadata, partial)
        (partial / METADATA).write_text(json.dumps(asdict(metadata), indent=2, sort_keys=True) + "\n")
        _replace(folder, partial)
    except OSError as error:
        raise BundleError(
            f"the bundle {folder} cannot be written ({error.strerror}): choose another --bundle"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _moved(pipeline: Pipeline, place: Callable[[str], str]) -> Pipeline:
    """The pipeline with other places for what its passes read."""
    for id, item in pipeline:
        for option in options(type(item)).values():
            value = getattr(item, option.field)
            if option.path and value:
                pipeline = pipeline.with_options(id, **{option.field: place(value)})
    return pipeline


def _with_inputs(metadata: Metadata, folder: Path) -> Metadata:
    """Copy into a bundle what the passes read; the pipelines then name the copies."""
    places: dict[str, str] = {}

    def place(value: str) -> str:
        if value not in places:
            places[value] = f"{INPUTS}/{len(places)}"
            (folder / places[value]).mkdir(parents=True)
            for file in list_folder(Path(value), error=BundleError):
                if file.suffix in _CARRIED and file.is_file():
                    shutil.copyfile(file, folder / places[value] / file.name)
        return places[value]

    try:
        texts = [str(_moved(Pipeline.parse(text), place)) for text in (metadata.pipeline, metadata.suffix)]
    except PipelineError:  # a pass that has no name elsewhere
        return metadata
    return replace(metadata, pipeline=texts[0], suffix=texts[1])


def _replace(folder: Path, new: Path) -> None:
    """Put a finished folder in the place of another one, which is back there should that fail."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle.

    Raises:
        BundleError: It is none, is damaged or of another version, or refers to files outside its folder.
    """
    metadata = _read_metadata(folder)
    return Bundle(folder, metadata, _read_module(folder, folder), _read_module(folder / START, folder))


def read_trace(folder: Path) -> tuple[list[Array], list[Array]]:
    """Inputs and expected outputs of the bundle's run, in the order of the graph's; both empty when it has none.

    Raises:
        BundleError: A tensor is damaged or lies outside the bundle.
    """
    return _read_tensors(folder, "input"), _read_tensors(folder, "output")


def _inlined(module: Module) -> Module:
    """A copy to save: the weights of a small model are the bundle's own, not links to all of a checkpoint."""
    copy = module.clone()
    tensors = [v.const_value for v in copy.graph.initializers.values() if v.const_value is not None]
    if sum(t.nbytes for t in tensors) <= _SMALL_BYTES:
        for value in copy.graph.initializers.values():
            if isinstance(value.const_value, ir.LazyTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), value.const_value.dtype, name=value.name)
    return copy


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle (it has no {METADATA}): 'qeff opt --bundle DIR' writes one")
    try:
        data: Any = parse_json(read_bytes(_inside(path, folder), folder, error=BundleError), "its text", BundleError)
    except BundleError as error:
        raise BundleError(f"{path} is damaged ({error})") from error
    try:
        if data["version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{folder} has schema version {ascii(data['version'])[:40]}, this qeff-ir reads {SCHEMA_VERSION}"
            )
        metadata = Metadata(**data)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged ({error})") from error
    if any(type(data[name]) is not kind for name, kind in _FIELDS.items()):
        raise BundleError(f"{path} is damaged (a field is of the wrong type)")
    if not (0 <= metadata.check <= _LEVELS and 0 <= metadata.seed < _SEEDS):
        raise BundleError(f"{path} is damaged (there is no check level {metadata.check}, or no seed {metadata.seed})")
    if not all(isinstance(version, str) for version in cast("Mapping[str, object]", metadata.versions).values()):
        raise BundleError(f"{path} is damaged (a version is no text)")
    return metadata


def _read_module(folder: Path, root: Path) -> Module:
    try:
        path = _inside(folder / MODEL_FILE, root)
        return load_module(regular_file(path, root, error=BundleError))
    except BundleError:
        raise
    except (OSError, ValueError, KeyError, TypeError, QeffError) as error:
        raise BundleError(f"{folder / MODEL_FILE} cannot be read: {error}") from error
    except Exception as error:  # protobuf has an exception class for each of its implementations
        raise BundleError(f"{folder / MODEL_FILE} is no ONNX file ({type(error).__name__})") from error


def _inside(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{path} leads out of the bundle: refused")
    return path


def _write_trace(folder: Path, trace: Answers) -> None:
    folder.mkdir(parents=True)
    for kind, arrays in (("input", trace.first_feeds), ("output", trace.first_outputs)):
        for index, (name, array) in enumerate(arrays.items()):
            content = onnx.numpy_helper.from_array(array, name).SerializeToString()
            (folder / f"{kind}_{index}.pb").write_bytes(content)


def _read_tensors(folder: Path, kind: str) -> list[Array]:
    found: list[Array] = []
    while os.path.lexists(path := folder / DATA_SET / f"{kind}_{len(found)}.pb"):
        tensor = onnx.TensorProto()
        try:
            data = read_bytes(_inside(path, folder), folder, limit=_MAX_TRACE_BYTES, error=BundleError)
            tensor.ParseFromString(data)
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise BundleError(f"{path} refers to another file: refused")
            found.append(onnx.numpy_helper.to_array(tensor))
        except BundleError:
            raise
        except Exception as error:  # protobuf has an exception class for each of its implementations
            raise BundleError(f"{path} is no ONNX tensor ({type(error).__name__})") from error
    return found
