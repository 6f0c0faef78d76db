"""Give a lowered model the element type that transformers would load it in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.ports import NEXT_TOKENS
from qeff_ir.ir.sources import source_text
from qeff_ir.numerics import Approximates, Numeric
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.quantized import quantized
from qeff_ir.ranges import narrow

from ._halves import CONTRACTIONS, MOVES, NORMS, WIDENING, rounded, takes

_FLOAT = ir.DataType.FLOAT


@register
@dataclass(frozen=True, slots=True)
class Dtype(Pass):
    """Make activations, states and weights float16 or bfloat16, with float32 where transformers computes in it.

    Weights take the type: one that is stored in it stays a reference. A result takes it too, but for these:

    * what follows from positions and constants alone (rotary angles, masks) is float32, and is rounded where it meets
      activations;
    * a norm is computed in float32, and its result is rounded;
    * a softmax, a reduction, an exponential and their like are computed in float32, and their results stay so until
      they meet activations: an elementwise operator of both is computed in float32, and rounds once; a matrix product
      takes its operands rounded.

    Inputs and outputs that are no states stay float32 (AI 100 contract §1.2: logits end in a cast). What `sampling`
    makes of logits is float32 too, and comes after.
    """

    name: ClassVar[str] = "dtype"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"fp16-range"})  # -65504 is -65536 in bfloat16
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Approximates("numbers of 16 bits have 11 or 8 bits of precision", decibels=30.0)
    idempotent: ClassVar[bool] = True

    type: Literal["float16", "bfloat16"] = field(default="float16", metadata={"help": "element type of the result"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Go through the graph once, in order.

        Raises:
            PassError: The module has another half type already, quantized weights, or control flow around floats, or it
                draws its tokens.
        """
        if module.find(NEXT_TOKENS) is not None:
            raise PassError("the tokens are drawn in float32 already: put dtype before sampling")
        half = ir.DataType[self.type.upper()]
        found = {value.dtype for value in (*module.graph.inputs, *module.graph.initializers.values())}
        if half in found:
            return
        if found & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}:
            raise PassError("the module has another type of 16 bits already: lower the model again")
        if any(node.op_type == "MatMulNBits" for node in module.graph):
            raise PassError("weights of 4 bits are multiplied by an operator that takes float32: leave out dtype")
        if rewriter.rewrite(self.type):
            _Retyping(module, rewriter, half).run()


class _Retyping:
    """One run of the pass: which float values are halves, and which float32 ones follow from activations."""

    def __init__(self, module: Module, rewriter: Rewriter, half: ir.DataType) -> None:
        self.module, self.rewriter, self.half = module, rewriter, half
        self.wide = set[ir.Value]()
        """Float32 values that follow from weights, states or inputs; other float32 values follow from positions."""
        self.inner = set[ir.Node]()
        """What scales or shifts a value for nodes that compute in float32, and for no others: so it does too."""
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Retype states, weights and inputs, then each node, then what is returned."""
        graph, states, nodes = self.module.graph, self.module.states, list(self.module.graph)
        kept = {name for state in states for name in (state.input, state.output)}
        for value in graph.initializers.values():
            if WEIGHT_KEY in value.metadata_props and value.dtype == _FLOAT:
                self._retype_weight(value)
        for value in graph.inputs:
            if value.dtype == _FLOAT and value.name in kept:
                value.type = ir.TensorType(self.half)  # of its own: values may share theirs
            elif value.dtype == _FLOAT and nodes:
                self._round(value, self.rewriter.at(nodes[0]))
        own = [dataclasses.replace(s, dtype=self.half if s.dtype == _FLOAT else s.dtype) for s in states]
        self.module.residents = [*own, *self.module.adapters]
        for node in reversed(nodes):
            if self._is_inner(node):
                self.inner.add(node)
        for node in nodes:
            self._retype(node)
        for index, value in enumerate(graph.outputs):
            maker, wanted = value.producer(), self.half if value.name in kept else _FLOAT
            if maker is not None and value.dtype in (_FLOAT, self.half) and value.dtype != wanted:
                name, value.name = value.name, None
                graph.outputs[index] = cast = self.rewriter.after(maker)(
                    "Cast", value, to=wanted, dtype=wanted, shape=value.shape
                )
                cast.name = name
        self.rewriter.sweep()

    def _retype_weight(self, value: ir.Value) -> None:
        tensor, stored, half = value.const_value, narrow(value.const_value), self.half
        assert tensor is not None
        if quantized(tensor) is not None:
            raise PassError(f"the weight '{value.name}' is quantized, and its numbers are float32: leave out dtype")
        value.type = ir.TensorType(half)
        if stored is not None and stored.dtype == half:
            value.const_value = stored
            return

        def read() -> ir.TensorProtocol:
            return ir.tensor(rounded(tensor.numpy(), half), dtype=half, name=tensor.name)

        value.const_value = ir.LazyTensor(read, half, ir.Shape(tensor.shape.numpy()), name=tensor.name)

    def _retype(self, node: ir.Node) -> None:
        """Give the operands of a node the type that it computes in, and its results theirs.

        Raises:
            PassError: It has a body that computes floats.
        """
        given = [v for v in node.inputs if v is not None and v.dtype in (_FLOAT, self.half)]
        made = [v for v in node.outputs if v.dtype == _FLOAT]
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            where = source_text(node) or "the model itself"
            raise PassError(f"{node.op_type} of {where} is control flow, whose body stays float32: leave out dtype")
        halves, wide = any(v.dtype == self.half for v in given), any(v in self.wide for v in given)
        squares = len(given) == 2 and given[0] is given[1]
        if node.op_type == "Cast" or not halves:
            self.wide.update(made if halves or wide else ())
        elif node.op_type in WIDENING or node in self.inner or (squares and node.op_type == "Mul"):
            self._take(node, given, _FLOAT)
            self.wide.update(made)
        elif node.op_type in NORMS or self._mixes(node, wide=wide):
            self._take(node, given, _FLOAT)
            for value in made:
                self._round(value, self.rewriter.after(node))
        else:
            self._take(node, given, self.half)
            for value in made:
                value.type = ir.TensorType(self.half)

    def _is_inner(self, node: ir.Node) -> bool:
        floats = [v for v in node.inputs if v is not None and v.dtype in (_FLOAT, self.half)]
        users = [user for value in node.outputs for user in value.consumers()]
        alone = len(floats) - sum(map(_is_constant, floats)) == 1 and node.op_type not in MOVES | CONTRACTIONS | NORMS
        wide = all(user in self.inner or user.op_type in NORMS | WIDENING for user in users)
        return alone and wide and bool(users) and not any(value.is_graph_output() for value in node.outputs)

    def _mixes(self, node: ir.Node, *, wide: bool) -> bool:
        """Whether a node is computed in float32 because of an operand, or because ONNX has it in no other type."""
        opset = self.module.model.opset_imports.get("", 1)
        known = node.domain != "" or takes(node.op_type, opset, self.half)
        return not known or (wide and node.op_type not in MOVES | CONTRACTIONS)

    def _take(self, node: ir.Node, given: list[ir.Value], dtype: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in given and value.dtype != dtype:
                node.replace_input_with(index, self._as(value, dtype, node))

    def _as(self, value: ir.Value, dtype: ir.DataType, node: ir.Node) -> ir.Value:
        """The value in another type, made once, in front of the first node that takes it so."""
        if _is_constant(value) and value.const_value is not None:
            return self.rewriter.constant(rounded(value.const_value.numpy(), dtype))
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self.rewriter.at(node)("Cast", value, to=dtype, dtype=dtype, shape=value.shape)
        return self.casts[value, dtype]

    def _round(self, value: ir.Value, b: OpBuilder) -> None:
        """Let all users of a float32 value take it rounded; an output that hands it on is none."""
        users = [(u, i) for u, i in value.uses() if u.op_type != "Identity" or not u.outputs[0].is_graph_output()]
        if users:
            cast = b("Cast", value, to=self.half, dtype=self.half, shape=value.shape)
            for user, index in users:
                user.replace_input_with(index, cast)


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and WEIGHT_KEY not in value.metadata_props
