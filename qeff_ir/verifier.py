"""The rules of the IR: what holds of every module between any two passes.

Each rule has a stable code, which `VerificationError.code` carries:

====================  =================================================================================================
``order``             every node stands after the nodes whose results it reads, and every value read is defined
``names``             values have unique names
``operator``          every operator exists in the declared opset, or has a body in the model
``interface``         graph inputs and outputs have a type and a shape of sizes and declared dims
``state-pair``        every state has its input and its output, of the state's type and shape
``state-roles``       no two states share layer and role; key before value, layers ascending
``dims``              every specialization gives a size of at least 1 to every dim of the interface; its name is unique
``bounds``            no specialization exceeds the maximum of a dim
====================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
import onnx_ir as ir

from qeff_ir.errors import VerificationError
from qeff_ir.module import SOURCE_KEY, Module, State


def verify(module: Module) -> None:
    """Check every rule.

    Raises:
        VerificationError: The first rule that does not hold, with the place.
    """
    _check_order(module.graph)
    _check_operators(module.model)
    _check_interface(module)
    _check_states(module)
    _check_specializations(module)


def _place(node: ir.Node) -> str:
    source = node.metadata_props.get(SOURCE_KEY)
    return f"{node.op_type} '{node.outputs[0].name}'" + (f" of {source}" if source else "")


def _check_order(graph: ir.Graph) -> None:
    names: dict[str, ir.Value] = {}

    def define(value: ir.Value, where: str) -> None:
        if value.name and names.setdefault(value.name, value) is not value:
            raise VerificationError("names", f"two values are named '{value.name}', the second is {where}")

    defined: set[ir.Value] = set()
    for value in (*graph.inputs, *graph.initializers.values()):
        define(value, "a graph input or initializer")
        defined.add(value)
    _check_nodes(graph, defined, define)
    for value in graph.outputs:
        if value not in defined:
            raise VerificationError("order", f"graph output '{value.name}' is made by no node")


def _check_nodes(graph: Iterable[ir.Node], defined: set[ir.Value], define: Callable[[ir.Value, str], None]) -> None:
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in defined:
                raise VerificationError("order", f"{_place(node)} reads '{value.name}' before it is defined")
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner = attribute.as_graph()
                _check_nodes(inner, defined | {*inner.inputs, *inner.initializers.values()}, define)
        for value in node.outputs:
            define(value, f"a result of {_place(node)}")
            defined.add(value)


def _check_operators(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in model.opset_imports:
            raise VerificationError("operator", f"{_place(node)} is of domain '{node.domain}', which is not imported")
        if node.op_identifier() in model.functions or node.domain not in ("", "ai.onnx.ml"):
            if node.op_identifier() not in model.functions and node.domain in _WITH_BODIES:
                raise VerificationError("operator", f"{_place(node)} has no body in the model: attach it")
            continue
        try:
            onnx.defs.get_schema(node.op_type, model.opset_imports[node.domain], node.domain)
        except onnx.defs.SchemaError as error:
            opset = model.opset_imports[node.domain]
            raise VerificationError("operator", f"{_place(node)} does not exist in opset {opset}") from error


_WITH_BODIES = frozenset({"qeff", "com.qualcomm.cloud", "com.qti.aisw.onnx"})
"""Domains that no ONNX runtime knows: their ops need bodies for a snapshot to load."""


def _check_interface(module: Module) -> None:
    for kind, values in (("input", module.graph.inputs), ("output", module.graph.outputs)):
        for value in values:
            if value.dtype is None or value.shape is None:
                raise VerificationError("interface", f"graph {kind} '{value.name}' has no type or no shape")
            for dim in value.shape:
                if isinstance(dim, ir.SymbolicDim) and dim.value not in module.dims:
                    raise VerificationError(
                        "interface",
                        f"graph {kind} '{value.name}' has the dim '{dim.value}', which the module does not declare",
                    )


def _check_states(module: Module) -> None:
    inputs = {v.name: v for v in module.graph.inputs}
    outputs = {v.name: v for v in module.graph.outputs}
    for state in module.states:
        for kind, name, values in (("input", state.input, inputs), ("output", state.output, outputs)):
            value = values.get(name)
            if value is None:
                raise VerificationError(
                    "state-pair", f"the {state.role} state of layer {state.layer} has no {kind} '{name}'"
                )
            if value.dtype != state.dtype or _dims(value) != state.shape:
                raise VerificationError(
                    "state-pair",
                    f"graph {kind} '{name}' is {value.dtype} {list(_dims(value))}, its state says {state.dtype} "
                    f"{list(state.shape)}",
                )
    order = [s.order for s in module.states]
    if len(set(order)) != len(order) or order != sorted(order):
        raise VerificationError(
            "state-roles",
            f"the states are not ordered by layer, key before value, each once: {[s.input for s in module.states]}",
        )
    stray = [n for n in outputs if n and n.endswith(State.SUFFIX) and n not in {s.output for s in module.states}]
    if stray:
        raise VerificationError(
            "state-pair", f"graph output '{stray[0]}' is named like a state, but the module declares none"
        )


def _dims(value: ir.Value) -> tuple[str | int | None, ...]:
    return tuple(d if isinstance(d, int) else d.value for d in value.shape or ())


def _check_specializations(module: Module) -> None:
    names = [s.name for s in module.specializations]
    if len(set(names)) != len(names):
        raise VerificationError("dims", f"two specializations have the same name: {', '.join(names)}")
    used = {d for v in (*module.graph.inputs, *module.graph.outputs) for d in _dims(v) if isinstance(d, str)}
    for specialization in module.specializations:
        for dim in sorted(used):
            if specialization.symbols.get(dim, 0) < 1:
                raise VerificationError("dims", f"specialization {specialization.name} gives no size to '{dim}'")
        for dim, size in specialization.symbols.items():
            limit = module.dims[dim].maximum if dim in module.dims else None
            if limit is not None and size > limit:
                raise VerificationError(
                    "bounds",
                    f"specialization {specialization.name} asks for {dim}={size}, the model takes at most {limit}",
                )
