"""The text form of a module: readable, stable, one node a line, made for diffs.

    module LlamaForCausalLM (qeff 1, standard 24)
    dim ctx_len <= 256
    state past_key.0: float[batch_size, 2, ctx_len, 16]
    in  %input_ids: int64[batch_size, seq_len]
    weight %lm_head.weight: float[97, 64]
    const %const.int64.1.6e340b9c: int64[1] = [0]
    %linear: float[batch_size, seq_len, 64] = MatMul(%rms_norm, %t)  ; model.layers.0.mlp
    out %logits: float[batch_size, seq_len, 97]

Weights are named, never printed; constants are printed up to eight elements, larger ones as a digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qeff_ir.module import PASS_KEY, SOURCE_KEY, WEIGHT_KEY, Module

_INLINE = 8
_VALUE = re.compile(r"%[^\s,:()]+")


def to_text(module: Module, *, origins: bool = True) -> str:
    """The module as text, ending in a line break.

    Args:
        module: What to print.
        origins: Whether each node tells the Hugging Face module and the pass that it came from.
    """
    return "\n".join(_lines(module, origins)) + "\n"


def fingerprint(module: Module) -> str:
    """A digest of all that the text form shows: equal for equal modules, whatever the objects."""
    return hashlib.sha256(to_text(module).encode()).hexdigest()


def structure(module: Module) -> str:
    """A digest of the graph alone: equal when only the names of inner values and the origins of nodes differ."""
    keep = {v.name for v in (*module.graph.inputs, *module.graph.outputs, *module.graph.initializers.values())}
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        name = match.group()[1:]
        return name if name in keep else numbers.setdefault(name, f"%{len(numbers)}")

    lines = (line for line in _lines(module, origins=False) if not line.startswith(("const ", "properties ")))
    return hashlib.sha256(_VALUE.sub(numbered, "\n".join(lines)).encode()).hexdigest()


def _lines(module: Module, origins: bool) -> Iterator[str]:
    opsets = sorted((domain or "standard", version) for domain, version in module.model.opset_imports.items())
    yield f"module {module.name} ({', '.join(f'{domain} {version}' for domain, version in opsets)})"
    for dim in module.dims.values():
        yield f"dim {dim.name}" + (f" <= {dim.maximum}" if dim.maximum is not None else "")
    for state in module.states:
        marks = [f"window={state.window}"] if state.window is not None else []
        marks += ["ring"] if state.ring else []
        shape = ", ".join(map(str, state.shape))
        yield " ".join([f"state {state.input}: {state.dtype.name.lower()}[{shape}]", *marks])
    for item in module.specializations:
        yield f"specialization {item.name}: " + " ".join(f"{k}={v}" for k, v in sorted(item.symbols.items()))
    if module.properties:
        yield f"properties {' '.join(sorted(module.properties))}"
    for value in module.graph.inputs:
        yield f"in  {_typed(value)}"
    for name in sorted(module.graph.initializers):
        value = module.graph.initializers[name]
        yield (
            f"weight {_typed(value)}"
            if WEIGHT_KEY in value.metadata_props
            else f"const {_typed(value)} = {_numbers(value)}"
        )
    yield from _nodes(module.graph, "", origins)
    for value in module.graph.outputs:
        yield f"out {_typed(value)}"


def _nodes(graph: ir.Graph, indent: str, origins: bool) -> Iterator[str]:
    for node in graph:
        outputs = ", ".join(_typed(v) for v in node.outputs)
        inputs = ", ".join(f"%{v.name}" if v is not None else "_" for v in node.inputs)
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        plain = [a for a in sorted(node.attributes.values(), key=lambda a: a.name) if a.type != ir.AttributeType.GRAPH]
        options = " {" + " ".join(f"{a.name}={attribute_text(a)}" for a in plain) + "}" if plain else ""
        line = f"{indent}{outputs} = {name}({inputs}){options}"
        source, made = node.metadata_props.get(SOURCE_KEY), node.metadata_props.get(PASS_KEY)
        if origins and (source or made):
            line += f"  ; {source or '-'}" + (f" <- {made}" if made else "")
        yield line
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield f"{indent}  {attribute.name}:"
                yield from _nodes(attribute.as_graph(), indent + "    ", origins)


def type_text(value: ir.Value) -> str:
    """Element type and shape of a value: ``float[batch_size, 64]``, ``?`` for what is not known."""
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = "?" if value.shape is None else ", ".join(_dim(d) for d in value.shape)
    return f"{dtype}[{shape}]"


def _typed(value: ir.Value) -> str:
    return f"%{value.name}: {type_text(value)}"


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else (dim.value or "?")


def _numbers(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return "?"
    if tensor.size <= _INLINE:
        return str(tensor.numpy().tolist())
    return f"sha256:{hashlib.sha256(tensor.tobytes()).hexdigest()[:16]}"


def attribute_text(attribute: ir.Attr) -> str:
    """The value of an attribute, large tensors as a digest; a graph is told by the number of its nodes."""
    if attribute.type == ir.AttributeType.GRAPH:
        return f"{len(attribute.as_graph())} nodes"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:16]
        return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}:{digest}"
    if attribute.type == ir.AttributeType.FLOAT:
        return str(np.float32(attribute.as_float()))  # ONNX stores float32; more digits would not survive saving
    if attribute.type == ir.AttributeType.FLOATS:
        return str([str(np.float32(number)) for number in attribute.as_floats()])
    return str(attribute.value)
