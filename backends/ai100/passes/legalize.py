"""Write a graph in the operators and the opset that a compiler takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.ir.sources import source_text
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect

from ._lowerings import LOWERINGS, Lowering


@register
@dataclass(frozen=True, slots=True)
class Legalize(Pass):
    """Lower operators that are newer than ``opset`` to older ones, then declare that opset.

    `RMSNormalization` becomes the AI 100's `CustomRMSNorm`; `RotaryEmbedding`, `Swish` and `Gelu` become arithmetic.

    Guarantees: every standard node is one that ``opset`` has, attributes included.
    """

    name: ClassVar[str] = "legalize"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    establishes: ClassVar[frozenset[str]] = frozenset({"legal"})
    expect: ClassVar[Expect] = AllSites()
    idempotent: ClassVar[bool] = True

    opset: int = field(default=18, metadata={"help": "standard opset of the result"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower what has to be lowered.

        Raises:
            PassError: An operator, or an attribute of it, has no form in that opset; names the module it comes from.
        """
        for node in self.sites(module):
            lowering = LOWERINGS[node.op_type]
            _check_lowering(node, lowering, self.opset)
            rewriter.replace(node, lowering.make(node, rewriter.at(node)))
        rewriter.sweep()
        older = module.model.opset_imports.get("") != self.opset
        if older and rewriter.rewrite("opset"):  # once no operator is newer
            for node in module.graph:
                if node.domain == "":
                    _check(node, self.opset)
            module.model.opset_imports[""] = self.opset
        operators.attach(module.model)  # whose bodies are of the opset

    def sites(self, module: Module) -> list[ir.Node]:
        """Operators with a lowering that the opset does not have."""
        return [
            node
            for node in module.graph
            if node.domain == "" and node.op_type in LOWERINGS and _version(node.op_type, self.opset) is None
        ]


_OLDER_MODES = {"linear": "bilinear", "cubic": "bicubic"}
"""What `GridSample` called its modes before opset 20."""


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
    if schema is None:
        raise PassError(
            f"operator {node.op_type} from {_source(node)} does not exist in opset {opset}, and has no lowering"
        )
    mode = node.attributes.get("mode")
    if schema.since_version < 20 and node.op_type == "GridSample" and mode is not None:
        node.attributes.add(ir.AttrString("mode", _OLDER_MODES.get(mode.as_string(), mode.as_string())))
    for name in [n for n in node.attributes if n not in schema.attributes]:
        if not _is_default(node, name):
            raise PassError(
                f"attribute '{name}' of {node.op_type} from {_source(node)} does not exist in opset {opset}"
            )
        del node.attributes[name]
    node.version = None


def _check_lowering(node: ir.Node, lowering: Lowering, opset: int) -> None:
    """Refuse a node that its lowering cannot express."""
    for name in node.attributes.keys() - lowering.takes:
        if not _is_default(node, name):
            raise PassError(
                f"operator {node.op_type} from {_source(node)} does not exist in opset {opset}, and its lowering takes "
                f"no attribute '{name}'"
            )
    if any(value is not None for value in node.inputs[lowering.inputs :]):
        raise PassError(
            f"operator {node.op_type} from {_source(node)} does not exist in opset {opset}, and its lowering takes "
            f"{lowering.inputs} inputs, not {len(node.inputs)}"
        )


def _is_default(node: ir.Node, name: str) -> bool:
    """Whether an attribute says what its absence would."""
    known = onnx.defs.get_schema(node.op_type).attributes.get(name)
    if known is None or known.default_value.type == onnx.AttributeProto.UNDEFINED:
        return False
    return onnx.helper.get_attribute_value(known.default_value) == node.attributes[name].value


def _source(node: ir.Node) -> str:
    return source_text(node) or "the model itself"
