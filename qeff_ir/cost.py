"""What one run of a module costs, counted on its graph: bytes of weights and caches, multiply-adds, by operator.

The counts are of the graph alone, so that two pipelines can be compared without a device. Weights and caches are
counted as a target stores them (`Storage`), each once a run; a table of rows (an embedding) is counted by the rows that
a run reads. Activations are not counted: a target keeps them on the chip where it can.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from qeff_ir.errors import VerificationError
from qeff_ir.ir.module import WEIGHT_KEY, Module, Specialization
from qeff_ir.ir.needed import Needed
from qeff_ir.ir.ports import CACHE_ROWS, EMBEDDINGS
from qeff_ir.ir.residents import KINDS
from qeff_ir.passing.hiding import hidden_weights
from qeff_ir.quantized import quantized

_Shapes = Mapping[str, tuple[int, ...]]

_MATMULS = frozenset({"MatMul", "FusedMatMul", "MatMulNBits", "Gemm"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_ATTENTIONS = frozenset({"Attention", "SinkAttention"})


@dataclass(frozen=True)
class Storage:
    """How a target stores what the graph has as float32; `None` for as the graph has it.

    Attributes:
        weights: Bytes of one element of a weight.
        matmuls: Bytes of one element of a weight that is multiplied with, where they differ.
        states: Bytes of one element of a retained state.
    """

    weights: float | None = None
    matmuls: float | None = None
    states: float | None = None


@dataclass
class OpCost:
    """What all nodes of one operator cost in a run."""

    nodes: int = 0
    multiply_adds: int = 0
    weight_bytes: float = 0


@dataclass(frozen=True)
class Cost:
    """What one run of a specialization costs.

    Attributes:
        name: Of the specialization.
        tokens: Tokens that the run takes, all rows together; 0 of an encoder of pictures.
        weight_bytes: Bytes of weights that are read.
        state_bytes: Bytes of retained states that are read: every slot of the context, in the rows of the run.
        written_bytes: Bytes of states that are written: the slots of the run's own tokens.
        multiply_adds: Of products, convolutions and attention; elementwise work is left out.
        ops: The same by operator.
        resident_bytes: Weights and states, all that must fit the target's memory.
    """

    name: str
    tokens: int
    weight_bytes: float
    state_bytes: float
    written_bytes: float
    multiply_adds: int
    resident_bytes: float
    ops: dict[str, OpCost] = field(default_factory=dict[str, OpCost])


def cost(
    module: Module, specialization: Specialization, storage: Storage | None = None, *, fixed: bool = False
) -> Cost:
    """Count the cost of one run.

    Args:
        module: A lowered module.
        specialization: The sizes of its dims.
        storage: How the target stores weights and states; as the graph has them by default.
        fixed: Whether a compiler of fixed sizes leaves out what those of the run tell that it does not need
            (`qeff_ir.ir.needed`), such as the encoder of a decode run; else everything in the graph is counted.

    Raises:
        VerificationError: A size that a product, an attention or a state depends on is not known (code ``cost``).
    """
    stored = storage or Storage()
    symbols = _Sizes(specialization.symbols)
    shapes = _shapes(module, symbols)
    ops: dict[str, OpCost] = defaultdict(OpCost)
    multiplied = _multiplied(module)
    read: set[str] = set()
    resident = 0.0
    run = Needed(module.graph, shapes if fixed else {})
    for node in (node for node in module.graph if node in run.nodes or not fixed):
        item = ops[f"{node.domain}.{node.op_type}" if node.domain else node.op_type]
        item.nodes += 1
        item.multiply_adds += _multiply_adds(node, shapes)
        for value in node.inputs:
            name = value.name if value is not None else None
            if value is None or name is None or not _is_weight(module, value):
                continue
            rows = node.op_type in _LOOKUPS and value is not node.inputs[1]
            if not rows and name in read:
                continue
            elements = _looked_up(node, value, shapes) if rows else _elements(shapes, value)
            item.weight_bytes += elements * _width(value, stored, multiplied)
            if not rows:
                read.add(name)
    for value in (*module.graph.initializers.values(), *module.graph.inputs):
        if _is_weight(module, value):
            resident += _elements(shapes, value) * _width(value, stored, multiplied)
    kept = state_bytes = written = 0.0
    for state in module.states:
        sizes = [symbols[d] if isinstance(d, str) else d for d in state.shape]
        width = state.dtype.itemsize if stored.states is None else stored.states
        if state.shape[0] in ("batch_size", CACHE_ROWS):  # a run reads and writes its own rows of those that are kept
            kept += symbols.get(CACHE_ROWS, sizes[0]) * math.prod(sizes[1:]) * width
            sizes[0] = symbols["batch_size"]
        else:
            kept += math.prod(sizes) * width
        held = module.input(state.input)
        state_bytes += math.prod(sizes) * width if run.reads(held) else 0
        if run.source(module.output(state.output)) is held:  # it is handed on as it is
            continue
        axis = KINDS[state.kind].context_axis
        if axis is not None and isinstance(state.shape[axis], str):
            sizes[axis] = min(symbols["seq_len"], sizes[axis])
        written += math.prod(sizes) * width
    return Cost(
        specialization.name,
        symbols["batch_size"] * symbols["seq_len"] if "seq_len" in symbols else 0,
        sum(item.weight_bytes for item in ops.values()),
        state_bytes,
        written,
        sum(item.multiply_adds for item in ops.values()),
        resident + kept,
        dict(sorted(ops.items(), key=lambda pair: (-pair[1].multiply_adds, -pair[1].weight_bytes, pair[0]))),
    )


class _Sizes(dict[str, int]):
    def __missing__(self, name: str) -> int:
        raise VerificationError("cost", f"no specialization gives a size to '{name}', so the cost cannot be counted")


def _is_weight(module: Module, value: ir.Value) -> bool:
    """Whether a value is a weight, in the graph or bound from outside; the host's embeddings only name theirs."""
    return WEIGHT_KEY in value.metadata_props and module.role_of(value) is not EMBEDDINGS


def _multiply_adds(node: ir.Node, shapes: _Shapes) -> int:
    kind = node.op_type
    if kind in _MATMULS:
        return _elements(shapes, node.outputs[0]) * _matmul_depth(node, shapes)
    if kind == "Conv":
        return _elements(shapes, node.outputs[0]) * math.prod(_shape(shapes, node.inputs[1])[1:])
    if kind in _ATTENTIONS:
        batch, heads, seq, width = _shape(shapes, node.inputs[0])
        _, _, slots, out = _shape(shapes, node.inputs[2])
        return batch * heads * seq * slots * (width + out)
    if kind == "GroupQueryAttention":
        batch, seq, features = _shape(shapes, node.inputs[0])
        return 2 * batch * seq * features * _shape(shapes, node.inputs[3])[2]
    return 0


def _matmul_depth(node: ir.Node, shapes: _Shapes) -> int:
    left = _shape(shapes, node.inputs[0])
    transposed = node.attributes.get("transA")
    return left[-2] if transposed is not None and transposed.as_int() else left[-1]


def _multiplied(module: Module) -> set[ir.Value]:
    """Weights that go into a product, as they are, transposed or side by side."""
    found: set[ir.Value] = set()
    for node in module.graph:
        if node.op_type in _MATMULS:
            for value in node.inputs[:2]:
                maker = value.producer() if value is not None else None
                source = maker.inputs[0] if maker is not None and maker.op_type == "Transpose" else value
                beside = source.producer() if source is not None else None
                parts = beside.inputs if beside is not None and beside.op_type == "Concat" else [source]
                found |= {v for v in parts if v is not None and (v.is_initializer() or _is_weight(module, v))}
    return found


def _width(value: ir.Value, stored: Storage, multiplied: set[ir.Value]) -> float:
    """Bytes of one element of a weight."""
    assert value.dtype is not None
    parts = quantized(value.const_value)
    if parts is not None:
        return parts.nbytes / parts.codes.size
    if not value.dtype.is_floating_point():
        return value.dtype.itemsize
    if stored.matmuls is not None and value in multiplied:
        return stored.matmuls
    return value.dtype.itemsize if stored.weights is None else stored.weights


def _looked_up(node: ir.Node, value: ir.Value, shapes: _Shapes) -> int:
    """Elements of a table that are read: of codes, and of what stands beside them, the share of the rows."""
    if node.op_type == "Gather":
        return _elements(shapes, node.outputs[0])
    return _elements(shapes, node.inputs[1]) * math.prod(_shape(shapes, value)[1:])


def _elements(shapes: _Shapes, value: ir.Value | None) -> int:
    return math.prod(_shape(shapes, value))


def _shape(shapes: _Shapes, value: ir.Value | None) -> tuple[int, ...]:
    name = value.name if value is not None else None
    if name is None or name not in shapes:
        raise VerificationError("cost", f"the size of '{name}' is not known, so its cost cannot be counted")
    return shapes[name]


def _shapes(module: Module, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Sizes of all values whose sizes follow from those of the interface."""
    clone = module.clone()
    for value in (*clone.graph.inputs, *clone.graph.outputs, *(v for n in clone.graph for v in n.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_size(d, symbols) for d in value.shape])
    with hidden_weights(clone.graph):
        proto = ir.to_proto(clone.model)
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, tuple[int, ...]] = {
        name: tuple(value.shape.numpy())
        for name, value in module.graph.initializers.items()
        if value.shape is not None and value.shape.is_static()
    }
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[info.name] = tuple(d.dim_value for d in dims)
    return found


def _size(dim: int | ir.SymbolicDim, symbols: Mapping[str, int]) -> int | ir.SymbolicDim:
    """The size of a dim; what is an expression is left to shape inference."""
    if isinstance(dim, int):
        return dim
    size = symbols.get(dim.value or "")
    return ir.SymbolicDim(None) if size is None else size
