"""The text form of a module: readable, stable, one node a line, made for diffs.

    module LlamaForCausalLM (qeff 1, standard 24)
    dim ctx_len <= 256
    state past_key.0: float[batch_size, 2, ctx_len, 16]
    in  %input_ids: int64[batch_size, seq_len]
    weight %lm_head.weight: float[97, 64]
    const %const.int64.1.6e340b9c: int64[1] = [0]
    %linear: float[batch_size, seq_len, 64] = MatMul(%rms_norm, %t)  ; model.layers.0.mlp
    out %logits: float[batch_size, seq_len, 97]
    function qeff.CacheUpdate: sha256:1f0c5d3a9b7e2468

Weights are named, never printed; constants are printed up to eight elements, larger ones as a digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qeff_ir.ir import ports
from qeff_ir.ir.module import PASS_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.sources import source_text
from qeff_ir.quantized import quantized

_INLINE = 8
_AROUND = 2
_WIDTH = 112
"""Of an excerpt: lines before and after the place, and columns."""
_VALUE = re.compile(r"%[^\s,:()]+")


def to_text(module: Module, *, origins: bool = True) -> str:
    """The module as text, ending in a line break.

    Args:
        module: What to print.
        origins: Whether each node tells the Hugging Face module and the pass that it came from.
    """
    return "\n".join(line for _, line in _lines(module, origins)) + "\n"


def fingerprint(module: Module) -> str:
    """A digest of all that the text form shows: equal for equal modules, whatever the objects."""
    return hashlib.sha256(to_text(module).encode()).hexdigest()


def structure(module: Module) -> str:
    """A digest of the graph alone: equal when only the names of inner values and the origins of nodes differ."""
    constants = {n: v for n, v in module.graph.initializers.items() if WEIGHT_KEY not in v.metadata_props}
    skipped = {"properties", *(f"const {name}" for name, value in constants.items() if not value.uses())}
    keep = {v.name for v in (*module.graph.inputs, *module.graph.outputs, *module.graph.initializers.values())}
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        name = match.group()[1:]
        return name if name in keep else numbers.setdefault(name, f"%{len(numbers)}")

    lines = (line for subject, line in _lines(module, origins=False) if subject not in skipped)
    return hashlib.sha256(_VALUE.sub(numbered, "\n".join(lines)).encode()).hexdigest()


def excerpt(module: Module, subject: ir.Node | str, word: str = "") -> str:
    """The lines of the text form around a place, numbered, with a caret below a word; empty when it has no line.

    Args:
        module: What to print.
        subject: A node, or the start of a line without its sign: ``in input_ids``, ``state past_key.0``.
        word: What the caret points at; the whole line by default.
    """
    lines = list(_lines(module, origins=True))
    at = next((i for i, (known, _) in enumerate(lines) if known is subject or known == subject), None)
    if at is None:
        return ""
    shown: list[str] = []
    for index in range(max(at - _AROUND, 0), min(at + _AROUND + 1, len(lines))):
        line = lines[index][1]
        start = max(line.find(word), 0) if word else 0
        cut = max(start - _WIDTH // 2, 0) if index == at and start + len(word) > _WIDTH else 0  # keeps the word in view
        clipped = line[cut : cut + _WIDTH]
        shown.append(f"  {'>' if index == at else ' '}{index + 1:5} | {clipped}")
        if index == at:
            shown.append(
                f"         | {' ' * (start - cut)}{'^' * (len(word) if word in line and word else len(clipped))}"
            )
    return "\n".join(shown)


def interface(module: Module) -> list[str]:
    """The lines of all a caller relies on: dims, residents, specializations, graph inputs, outputs, in order."""
    facts, inputs = (line for _, line in _facts(module)), (f"in  {_typed(value)}" for value in module.graph.inputs)
    return [*facts, *inputs, *map(output_line, module.graph.outputs)]


def output_line(value: ir.Value) -> str:
    """The line of a graph output."""
    return f"out {_typed(value)}"


def bodies(module: Module) -> dict[str, str]:
    """A digest of what each function of the model computes, by domain and name; types and opsets aside."""
    found: dict[str, str] = {}
    for function in module.model.functions.values():
        heads = [" ".join(str(v.name) for v in values) for values in (function.inputs, function.outputs)]
        lines = [*heads, *(line for _, line in _nodes(function.graph, "", False, typed=False))]
        found[f"{function.domain}.{function.name}"] = _digest("\n".join(lines).encode())
    return dict(sorted(found.items()))


def _lines(module: Module, origins: bool) -> Iterator[tuple[ir.Node | str, str]]:
    """Each line with what it is about: a node, or a word and a name."""
    opsets = sorted((domain or "standard", version) for domain, version in module.model.opset_imports.items())
    yield "module", f"module {module.name} ({', '.join(f'{domain} {version}' for domain, version in opsets)})"
    yield from _facts(module)
    if module.properties:
        yield "properties", f"properties {' '.join(sorted(module.properties))}"
    told = ports.known(module.graph)  # by their names
    for value in (*module.graph.inputs, *module.graph.outputs):
        name = str(value.name)
        if module.ports.get(name) != told.get(name):
            yield f"port {name}", f"port {name}: {module.ports.get(name, 'no role')}"
    for value in module.graph.inputs:
        yield f"in {value.name}", f"in  {_typed(value)}"
    for name in sorted(module.graph.initializers):
        value = module.graph.initializers[name]
        if WEIGHT_KEY in value.metadata_props:
            yield f"weight {name}", f"weight {_typed(value)}{_quantization(value)}"
        else:
            yield f"const {name}", f"const {_typed(value)} = {_numbers(value)}"
    yield from _nodes(module.graph, "", origins)
    for value in module.graph.outputs:
        yield f"out {value.name}", output_line(value)
    for name, digest in bodies(module).items():
        yield f"function {name}", f"function {name}: {digest}"


def _quantization(value: ir.Value) -> str:
    """What a quantized weight is made of: element type of the codes, block, axis."""
    parts = quantized(value.const_value)
    if parts is None:
        return ""
    zeros = "" if parts.zeros is None else " with zeros"
    return f" of {parts.codes.dtype.name.lower()}, a scale for {parts.block} along axis {parts.axis}{zeros}"


def _facts(module: Module) -> Iterator[tuple[str, str]]:
    for dim in module.dims.values():
        yield f"dim {dim.name}", f"dim {dim.name}" + (f" <= {dim.maximum}" if dim.maximum is not None else "")
    for state in module.residents:
        marks = [f"window={state.window}"] if state.window is not None else []
        marks += [word for word, holds in (("ring", state.ring), ("not retained", not state.retained)) if holds]
        shape = ", ".join(map(str, state.shape))
        text = f"state {state.input}: {state.dtype.name.lower()}[{shape}]"
        yield f"state {state.input}", " ".join([text, *marks])
    for item in module.specializations:
        symbols = " ".join(f"{k}={v}" for k, v in sorted(item.symbols.items()))
        yield f"specialization {item.name}", f"specialization {item.name}: {item.phase} {symbols}"


def _nodes(graph: ir.Graph, indent: str, origins: bool, *, typed: bool = True) -> Iterator[tuple[ir.Node, str]]:
    for node in graph:
        outputs = ", ".join(_typed(v) if typed else f"%{v.name}" for v in node.outputs)
        inputs = ", ".join(f"%{v.name}" if v is not None else "_" for v in node.inputs)
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        plain = [a for a in sorted(node.attributes.values(), key=lambda a: a.name) if a.type != ir.AttributeType.GRAPH]
        options = " {" + " ".join(f"{a.name}={attribute_text(a)}" for a in plain) + "}" if plain else ""
        line = f"{indent}{outputs} = {name}({inputs}){options}"
        source, made = source_text(node), node.metadata_props.get(PASS_KEY)
        if origins and (source or made):
            line += f"  ; {source or '-'}" + (f" <- {made}" if made else "")
        yield node, line
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield node, f"{indent}  {attribute.name}:"
                yield from _nodes(attribute.as_graph(), indent + "    ", origins, typed=typed)


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
    return _digest(tensor.tobytes())


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def attribute_text(attribute: ir.Attr) -> str:
    """The value of an attribute, large tensors as a digest; a graph is told by the number of its nodes.

    A reference to an attribute of the function around it is told by that one's name.
    """
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
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
