"""What the contract says of low-rank adapters that are weights of a package (§6.2 and §14.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import onnx

from backends.ai100.violation import Violation
from qeff_ir.errors import PackageError
from qeff_ir.reading import read_json

# Written out again: this module checks what the others make, and shares no names with them.
NUMBERS = "adaptername_to_id.json"
"""The number of each adapter by name, beside the package."""
_STACK = re.compile(r"\.lora_(a_weights|b_weights|biases)$")
_IDS = "lora_ids"


def adapters(
    proto: onnx.ModelProto, inputs: Collection[str], bound: Collection[str], folder: Path
) -> Iterator[Violation]:
    """Whoever fills ``lora_ids`` finds adapters: inputs of the graph, or weights whose names and numbers are told.

    Args:
        proto: The model.
        inputs: Names of what a run is given, or a state is.
        bound: Names of inputs that are bound to files of weights.
        folder: The package.
    """
    given = [name for name in inputs if re.search(r"\.lora_(A|B|a|b|bias|embedding)", name)]
    stacks = [tensor for tensor in proto.graph.initializer if _STACK.search(tensor.name)]
    baked = bool(stacks) or any(_STACK.search(name) for name in bound)
    there = (folder / NUMBERS).is_file()
    if _IDS not in inputs or given:
        if there:
            yield Violation("adapters", f"{NUMBERS} numbers adapters, and the graph has none that are weights")
        return
    if not baked:
        yield Violation("adapters", f"{_IDS} selects among adapters, and the graph has none")
    if not there:
        yield Violation("adapters", f"the adapters are weights, and no {NUMBERS} tells their numbers")
        return
    numbers = _numbers(folder / NUMBERS)
    if numbers is None:
        yield Violation("adapters", f"{NUMBERS} does not number adapters from 1 in order")
        return
    for tensor in stacks:
        if not tensor.dims or tensor.dims[0] <= numbers:
            yield Violation("adapters", f"{tensor.name} is {list(tensor.dims)}: {numbers} adapters need a slot each")
        elif any(_first_slot(tensor, folder)):
            yield Violation("adapters", f"{tensor.name} has numbers in slot 0, which is the base model's")


def _numbers(path: Path) -> int | None:
    """How many adapters a file numbers; `None` where it does not number them from 1 in order."""
    try:
        data: Any = read_json(path, error=PackageError)
    except PackageError:
        return None
    found = list(cast("dict[str, Any]", data).values()) if isinstance(data, dict) else []
    right = all(type(number) is int for number in found) and found == list(range(1, len(found) + 1))
    return len(found) if right and found else None


def _first_slot(tensor: onnx.TensorProto, folder: Path) -> bytes:
    """The bytes of the first entry of the first axis; none where they cannot be read, which others tell."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    try:
        size = math.prod(tensor.dims[1:]) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)[0].tobytes()
        with (folder / fields["location"]).open("rb") as file:
            file.seek(int(fields.get("offset", 0)))
            return file.read(size)
    except (OSError, KeyError, ValueError):
        return b""
