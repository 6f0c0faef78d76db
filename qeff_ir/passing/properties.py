"""Properties of modules that passes require, establish and destroy: a name, what it means, and how to check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qeff_ir.errors import PipelineError
from qeff_ir.ir import dialect
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.ports import KEPT_LOGITS, LOGITS
from qeff_ir.ir.sources import source_text

FP16_MAX = 65504.0

FAST = "fast"
"""Property of a module that answers other numbers on purpose: its drift is measured (`qeff_ir.debug.drift`), nothing is
proved of it. No checker can tell."""

Checker = Callable[[Module], str | None]
"""Why a property does not hold, as one clause; `None` when it does."""


@dataclass(frozen=True, slots=True)
class Property:
    """Something that holds of a module, or does not.

    Attributes:
        name: As passes declare it.
        meaning: One sentence.
        problem: The checker.
    """

    name: str
    meaning: str
    problem: Checker


PROPERTIES: dict[str, Property] = {}
"""All properties that have a checker, by name; a name that is not here is taken at its word."""


def define(name: str) -> Callable[[Checker], Checker]:
    """Decorator that makes a checker the meaning of a property; its docstring says it in words.

    Raises:
        PipelineError: The name is taken.
    """

    def add(checker: Checker) -> Checker:
        if name in PROPERTIES:
            raise PipelineError(f"two checkers define the property '{name}'; rename one")
        PROPERTIES[name] = Property(name, " ".join((checker.__doc__ or "").split()), checker)
        return checker

    return add


def problem(name: str, module: Module) -> str | None:
    """Why a property does not hold of a module, or `None` when it does or nobody can tell."""
    known = PROPERTIES.get(name)
    return known.problem(module) if known is not None else None


@define("canonical")
def _canonical(module: Module) -> str | None:
    """Constants but those that are answers are initializers, and no `Identity` stands between two nodes."""
    for node in module.graph:
        if node.domain == "" and node.op_type == "Constant" and not node.outputs[0].is_graph_output():
            return f"{_place(node)} is no initializer"
        if node.domain == "" and node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            return f"{_place(node)} does nothing"
    return None


@define("states-lowered")
def _states_lowered(module: Module) -> str | None:
    """Caches have a target's physical layout: no `CacheUpdate` and no `CachePositions` is left."""
    return _left(module, "CacheUpdate", "CachePositions")


@define("attention-lowered")
def _attention_lowered(module: Module) -> str | None:
    """Attention is made of standard operators: no `SinkAttention` is left."""
    return _left(module, "SinkAttention")


@define("last-logits")
def _last_logits(module: Module) -> str | None:
    """``logits`` are those of the last real tokens of each row: ``[batch, 1, vocab]``, or ``[batch, k, vocab]`` with k
    the length of an input; an encoder has none.
    """
    if not module.states and module.find(LOGITS) is None:
        return None
    shape, kept = module.port(LOGITS).shape, module.find(KEPT_LOGITS)
    count = 1 if kept is None or kept.shape is None else kept.shape[0]
    return None if shape is not None and shape[1] == count else f"the logits have the shape {shape}"


@define("fp16-range")
def _fp16_range(module: Module) -> str | None:
    """No constant is beyond ±65504, but for the -inf of masks."""
    for name, value in module.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or WEIGHT_KEY in value.metadata_props or not tensor.dtype.is_floating_point():
            continue
        numbers = tensor.numpy()
        if np.any((numbers > FP16_MAX) | ((numbers < -FP16_MAX) & ~np.isneginf(numbers))):
            return f"the constant '{name}' is beyond ±{FP16_MAX:.0f}"
    return None


@define("legal")
def _legal(module: Module) -> str | None:
    """Every standard node and attribute exists in the opset that the model declares."""
    opset = module.model.opset_imports[""]
    for node in ir.traversal.RecursiveGraphIterator(module.graph):
        if node.domain != "":
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset)
        except onnx.defs.SchemaError:
            return f"{_place(node)} does not exist in opset {opset}"
        strange = [name for name in node.attributes if name not in schema.attributes]
        if strange:
            return f"{_place(node)} has the attribute '{strange[0]}', which opset {opset} does not know"
    return None


def _left(module: Module, *op_types: str) -> str | None:
    for node in ir.traversal.RecursiveGraphIterator(module.graph):
        if node.domain == dialect.DOMAIN and node.op_type in op_types:
            return f"{_place(node)} is left"
    return None


def _place(node: ir.Node) -> str:
    source = source_text(node)
    return f"{node.op_type} '{node.outputs[0].name}'" + (f" of {source}" if source else "")
