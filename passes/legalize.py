"""Write a graph in the operators and the opset that a compiler takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from qeff_ir import device_ops
from qeff_ir.errors import PassError
from qeff_ir.module import SOURCE_KEY, Module
from qeff_ir.passing.base import OpBuilder, Pass, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect


@register
@dataclass(frozen=True, slots=True)
class Legalize(Pass):
    """Lower operators that are newer than ``opset`` to older ones, then declare that opset.

    `RMSNormalization` becomes the AI 100's `CustomRMSNorm`; `RotaryEmbedding`, `Swish` and `Gelu` become arithmetic.

    Guarantees: every standard node is one that ``opset`` has, attributes included.
    """

    name: ClassVar[str] = "legalize"
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    establishes: ClassVar[frozenset[str]] = frozenset({"legal"})
    expect: ClassVar[Expect] = AllSites()
    idempotent: ClassVar[bool] = True

    opset: int = field(default=18, metadata={"help": "standard opset of the result"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower what has to be lowered.

        Raises:
            PassError: An operator has no form in that opset; names the module it comes from.
        """
        for node in self.sites(module):
            rewriter.replace(node, _LOWERINGS[node.op_type](node, rewriter.at(node)))
        rewriter.sweep()
        older = module.model.opset_imports.get("") != self.opset
        if not rewriter.refused and older and rewriter.rewrite("opset"):  # once no operator is newer
            for node in module.graph:
                if node.domain == "":
                    _check(node, self.opset)
            module.model.opset_imports[""] = self.opset
        device_ops.attach(module.model)  # whose bodies are of the opset

    def sites(self, module: Module) -> list[ir.Node]:
        """Operators with a lowering that the opset does not have."""
        return [
            node
            for node in module.graph
            if node.domain == "" and node.op_type in _LOWERINGS and _version(node.op_type, self.opset) is None
        ]


def _rms_normalization(node: ir.Node, b: OpBuilder) -> ir.Value:
    x, scale = node.inputs[:2]
    epsilon = node.attributes["epsilon"].as_float()
    return b("CustomRMSNorm", x, scale, domain=device_ops.QTI_DOMAIN, epsilon=epsilon)


def _rotary_embedding(node: ir.Node, b: OpBuilder) -> ir.Value:
    """``x`` is ``[B, H, S, D]``; cosine and sine are ``[B, S, D/2]``."""
    x, cos, sin = node.inputs[:3]
    assert x is not None and x.shape is not None
    axis, half, end = b.const([3]), b.const([int(x.shape[3]) // 2]), b.const([int(x.shape[3])])  # pyright: ignore[reportArgumentType]
    first = b("Slice", x, b.const([0]), half, axis)
    second = b("Slice", x, half, end, axis)
    cos, sin = (b("Unsqueeze", v, b.const([1])) for v in (cos, sin))
    low = b("Sub", b("Mul", first, cos), b("Mul", second, sin))
    high = b("Add", b("Mul", second, cos), b("Mul", first, sin))
    return b("Concat", low, high, axis=-1)


def _swish(node: ir.Node, b: OpBuilder) -> ir.Value:
    return b("Mul", node.inputs[0], b("Sigmoid", node.inputs[0]))


def _gelu(node: ir.Node, b: OpBuilder) -> ir.Value:
    x = node.inputs[0]

    def f(number: float) -> ir.Value:
        return b.const(number, np.float32)

    tanh = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
    if tanh:
        cubic = b("Mul", b("Mul", b("Mul", x, x), x), f(0.044715))
        gate = b("Tanh", b("Mul", b("Add", x, cubic), f(math.sqrt(2.0 / math.pi))))
    else:
        gate = b("Erf", b("Mul", x, f(math.sqrt(0.5))))
    return b("Mul", b("Mul", x, f(0.5)), b("Add", gate, f(1.0)))


_LOWERINGS: dict[str, Callable[[ir.Node, OpBuilder], ir.Value]] = {
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Swish": _swish,
    "Gelu": _gelu,
}


def _version(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """The operator's schema in an opset, or `None` where it has none."""
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def _check(node: ir.Node, opset: int) -> None:
    """Refuse a node that the opset cannot express.

    Attributes that only newer versions know and that have their default value are dropped.
    """
    schema = _version(node.op_type, opset)
    source = node.metadata_props.get(SOURCE_KEY) or "the model itself"
    if schema is None:
        raise PassError(f"operator {node.op_type} from {source} does not exist in opset {opset}, and has no lowering")
    newest = onnx.defs.get_schema(node.op_type)
    for name in [n for n in node.attributes if n not in schema.attributes]:
        default = newest.attributes[name].default_value if name in newest.attributes else None
        if default is None or onnx.helper.get_attribute_value(default) != node.attributes[name].value:
            raise PassError(f"attribute '{name}' of {node.op_type} from {source} does not exist in opset {opset}")
        del node.attributes[name]
    node.version = None
