"""Tensors that stay in their files, and writing a model to a folder with the files that it refers to.

A weight is a range of bytes in a file. How the files of a checkpoint get into a package, see `qeff_ir.sharing`; tensors
that exist nowhere yet are written once, one at a time. Subgraphs, functions and the tensors in attributes are read and
written as the main graph is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qeff_ir import quantized, widening
from qeff_ir.errors import PackageError
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ranges import FileRange, file_range
from qeff_ir.reading import regular_file
from qeff_ir.sharing import WEIGHTS, share

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the ONNX file, as constants do in the AI 100 contract (§8)."""


def load_proto(path: Path, content: bytes | None = None) -> onnx.ModelProto:
    """Read an ONNX file as it is; no weight file is looked at.

    Args:
        path: The file.
        content: What it holds, where that was read already.

    Raises:
        PackageError: A string in it is not UTF-8.
    """
    proto = onnx.load_model_from_string(path.read_bytes() if content is None else content)
    strange = _no_text(proto)
    if strange is not None:  # protobuf hands it out as bytes, which no library expects
        raise PackageError(f"{path} has a string that is not UTF-8, {ascii(strange)[1:60]}: export it again")
    return proto


def _no_text(message: Any) -> bytes | None:
    """The first text of a protobuf message, and of those in it, that is not UTF-8."""
    for kind, value in message.ListFields():
        if kind.type not in (kind.TYPE_STRING, kind.TYPE_MESSAGE):
            continue
        for part in (value,) if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value:
            found = _no_text(part) if kind.type == kind.TYPE_MESSAGE else part if isinstance(part, bytes) else None
            if found is not None:
                return found
    return None


def load_model(path: Path, content: bytes | None = None) -> ir.Model:
    """Read an ONNX file whose weights stay where they are, as `save_model` wrote it.

    Args:
        path: The file.
        content: What it holds, where that was read already.

    Raises:
        PackageError: A tensor lies outside the file's own folder, or its file is missing or too short, or the tensor
            cannot be as long as is said; or an attribute has no type, or a string is not UTF-8.
    """
    model = ir.from_proto(load_proto(path, content))
    for graph in _all_graphs(model):
        for node in graph:
            untyped = (a.name for a in node.attributes.values() if a.type == ir.AttributeType.UNDEFINED)
            for name in untyped:
                raise PackageError(f"the attribute '{name}' of a {node.op_type} in {path} has no type: export it again")
    for tensor, put in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            put(_located(tensor, path).tensor(tensor.name or ""))
        else:
            _check_numbers(tensor, path)
    widening.fold(model)
    quantized.fold(model)
    return model


def save_model(
    model: ir.Model, folder: Path, filename: str, *, weights: str = WEIGHTS, prefer_links: bool = False
) -> None:
    """Write ``folder/filename`` and what it refers to under ``folder/weights``; `model` itself is unchanged.

    Files that tensors lie in get there as `qeff_ir.sharing` has it. All other initializers above 1 KiB go to one side
    file, one at a time. Up to that size, constants that are no weights stay in the ONNX file wherever they lay.

    Args:
        model: The model.
        folder: Where to write.
        filename: Of the ONNX file.
        weights: Of the folder of the weight files.
        prefer_links: Hard-link a checkpoint's files, whatever their size: for what only qeff-ir reads.

    Raises:
        PackageError: A referenced file is gone.
    """
    copy = model.clone()
    widening.spell(copy)
    quantized.spell(copy)
    initializers = {id(v.const_value): WEIGHT_KEY in v.metadata_props for v in copy.graph.initializers.values()}
    ranges: list[tuple[FileRange, str, Callable[[ir.TensorProtocol], None]]] = []
    loose: list[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]] = []
    for tensor, put in tensors(copy):
        small = tensor.nbytes <= INLINE_BYTES and not initializers.get(id(tensor), False)
        where = file_range(tensor)
        if where is not None and not small:
            ranges.append((where, tensor.name or "", put))
        elif where is not None:
            put(ir.tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name))
        elif id(tensor) in initializers and tensor.nbytes > INLINE_BYTES:
            loose.append((tensor, put))
    locations = place((where for where, _, _ in ranges), folder, weights=weights, prefer_links=prefer_links)
    for where, name, put in ranges:
        location, shape = locations[where.file], ir.Shape(where.shape)
        put(
            ir.ExternalTensor(
                location, where.offset, where.length, where.dtype, shape=shape, name=name, base_dir=folder
            )
        )
    if loose:
        (folder / weights).mkdir(parents=True, exist_ok=True)
        side = _free(weights, f"{Path(filename).stem}.data", locations.values())
        written = ir.external_data.convert_tensors_to_external([tensor for tensor, _ in loose], folder, side)
        for (_, put), tensor in zip(loose, written, strict=True):
            put(tensor)
    ir.save(copy, folder / filename)


def place(
    ranges: Iterable[FileRange],
    folder: Path,
    *,
    weights: str = WEIGHTS,
    reserved: Collection[str] = (),
    prefer_links: bool = False,
) -> dict[Path, str]:
    """Put the files of ranges below a folder; returns the location of each relative to it.

    Args:
        ranges: The ranges.
        folder: The folder.
        weights: See `save_model`.
        reserved: Locations that no file may get.
        prefer_links: See `save_model`.

    Raises:
        PackageError: A file is gone.
    """
    found: dict[Path, str] = {}
    new: dict[Path, Path] = {}
    linkable: set[Path] = set()
    there = os.listdir(folder / weights) if (folder / weights).is_dir() else []
    taken = {*reserved, *(f"{weights}/{name}" for name in there)}
    for where in ranges:
        source = where.file
        if where.linkable:
            linkable.add(source)
        if source in found:
            continue
        if not source.exists():
            raise PackageError(f"the weight file {source} is gone: restore it, or lower the model again")
        here = f"{weights}/{source.name}"
        if os.path.exists(folder / here) and source.samefile(folder / here):
            found[source] = here
            continue
        found[source] = _free(weights, source.name, taken)
        taken.add(found[source])
        new[source] = folder / found[source]
    if new:
        (folder / weights).mkdir(parents=True, exist_ok=True)
        share(new, linkable, prefer_links=prefer_links)
    return found


def tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    """Every tensor of a model, each with what puts another one in its place."""
    for graph in _all_graphs(model):
        for value in list(graph.initializers.values()):
            if value.const_value is not None:
                yield value.const_value, lambda tensor, value=value: setattr(value, "const_value", tensor)
        for node in graph:
            yield from _attributes(node)


def _all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from graph.subgraphs()


def _attributes(node: ir.Node) -> Iterator[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    for attribute in list(node.attributes.values()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            name = attribute.name

            def put(tensor: ir.TensorProtocol, name: str = name) -> None:
                node.attributes[name] = ir.AttrTensor(name, tensor)

            yield attribute.as_tensor(), put
        elif attribute.type == ir.AttributeType.TENSORS:
            several = list(attribute.as_tensors())

            def put_one(tensor: ir.TensorProtocol, index: int, name: str, several: list[ir.TensorProtocol]) -> None:
                several[index] = tensor
                node.attributes[name] = ir.AttrTensors(name, several)

            for index, tensor in enumerate(list(several)):
                yield tensor, lambda new, i=index, n=attribute.name, s=several: put_one(new, i, n, s)


def _check_numbers(tensor: ir.TensorProtocol, path: Path) -> None:
    """Check that a tensor inside of an ONNX file has the numbers that its type and sizes ask for.

    Raises:
        PackageError: It has fewer or more, or is of no type.
    """
    try:
        if tensor.dtype == ir.DataType.STRING:
            found, wanted = tensor.numpy().size, tensor.size
        else:
            found, wanted = len(tensor.tobytes()), tensor.nbytes  # of no numbers at all, the library makes zeros
            tensor.numpy()
        if found != wanted:
            raise ValueError(f"there are {found} of {wanted} bytes")
    except Exception as error:  # the library has one for each way in which numbers can lie in a tensor
        raise PackageError(
            f"the tensor '{tensor.name}' of {path} does not have the numbers of its sizes ({error}): write the file "
            "again"
        ) from error


def _located(tensor: ir.ExternalTensor, path: Path) -> FileRange:
    """Where a tensor of an ONNX file lies.

    Raises:
        PackageError: See `load_model`.
    """
    location = os.path.normpath(tensor.location)
    if os.path.isabs(location) or location.split(os.sep)[0] == os.pardir:
        raise PackageError(f"{path} refers to '{tensor.location}', outside its own folder: refused")
    file = path.parent / location
    if not os.path.exists(file):
        raise PackageError(f"{file}, a weight file of {path}, is missing or too short: compile again")
    file = regular_file(file, path.parent, error=PackageError)
    shape = tuple(int(d) for d in tensor.shape.numpy())
    size, start = tensor.nbytes, tensor.offset or 0
    length = size if tensor.length is None else tensor.length
    if start < 0 or length != size or tensor.dtype == ir.DataType.STRING:
        raise PackageError(
            f"the tensor '{tensor.name}' of {path} has {size} bytes, and {length} from {start} on are said to be its: "
            "write the file again"
        )
    if file.stat().st_size < start + length:
        raise PackageError(f"{file}, a weight file of {path}, is missing or too short: compile again")
    return FileRange(file, start, length, tensor.dtype, shape)


def _free(weights: str, name: str, taken: Collection[str]) -> str:
    """The location of a file of that name below a folder, or the first like it that is not taken."""
    places = (f"{weights}/{prefix}{name}" for prefix in itertools.chain([""], (f"{n}-" for n in itertools.count(1))))
    return next(place for place in places if place not in taken)
