"""The rules of the IR: what holds of every module between any two passes.

Each rule has a stable code, which `VerificationError.code` carries:

====================  =================================================================================================
``order``             every node stands after the nodes whose results it reads, and every value read is defined
``names``             values have unique names
``initializer``       every initializer has a tensor, of the type and the shape that it declares; the parts of a
                      quantized one fit each other
``operator``          every operator exists in the declared opset, or has a body in the model
``interface``         graph inputs and outputs have a type and a shape of sizes and declared dims; without states,
                      a size of an output that the model computes has no name, and a shape of its own making is open
``state-pair``        every resident has its input and, if retained, its output, of the resident's type and shape
``state-flow``        every resident's output is made of its own input
``state-kinds``       no two residents share a name; key before value, layers ascending, adapters last
``dims``              every specialization gives a size of at least 1 to every dim of the interface; its name is unique
``bounds``            no specialization exceeds the maximum of a dim
====================  =================================================================================================
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable

import onnx
import onnx_ir as ir

from qeff_ir.errors import VerificationError
from qeff_ir.ir import operators
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import excerpt
from qeff_ir.ir.residents import Resident
from qeff_ir.ir.sources import source_text
from qeff_ir.quantized import quantized


def verify(module: Module) -> None:
    """Check every rule.

    Raises:
        VerificationError: The first rule that does not hold, with the place.
    """
    check_order(module)
    _check_initializers(module)
    _check_operators(module)
    _check_interface(module)
    _check_residents(module)
    _check_flow(module)
    _check_specializations(module)


def broken(
    module: Module, code: str, message: str, at: ir.Node | str, word: str = "", *, hint: str = ""
) -> VerificationError:
    """A `VerificationError` that shows its place; `at` and `word` are those of `qeff_ir.ir.printer.excerpt`."""
    return VerificationError(code, message, lines=excerpt(module, at, word), hint=hint)


def _place(node: ir.Node) -> str:
    source = source_text(node)
    made = f" '{node.outputs[0].name}'" if node.outputs else " without a result"
    return f"{node.op_type}{made}" + (f" of {source}" if source else "")


_Define = Callable[[ir.Value, str, "ir.Node | str"], None]


def check_order(module: Module) -> None:
    """Check the rules ``order`` and ``names``, of the graph and of the bodies of functions.

    Raises:
        VerificationError: The first that does not hold, with the place.
    """
    graph, names = module.graph, dict[str, ir.Value]()

    def define(value: ir.Value, what: str, at: ir.Node | str) -> None:
        if value.name and names.setdefault(value.name, value) is not value:
            message = f"two values are named '{value.name}', the second is {what}"
            hint = "give one of them another name; a value without a name gets a unique one when its node is inserted"
            raise broken(module, "names", message, at, f"%{value.name}", hint=hint)

    defined: set[ir.Value] = set()
    for value in graph.inputs:
        define(value, "a graph input", f"in {value.name}")
        defined.add(value)
    for value in graph.initializers.values():
        define(value, "an initializer", _line(value))
        defined.add(value)
    _check_nodes(module, graph, defined, define)
    for value in graph.outputs:
        if value not in defined:
            message, hint = f"graph output '{value.name}' is made by no node", "rewriter.replace moves outputs along"
            raise broken(module, "order", message, f"out {value.name}", f"%{value.name}", hint=hint)
    for function in module.model.functions.values():
        inside = set(function.inputs)
        _check_nodes(module, function, inside, lambda *_: None)
        lost = next((v for v in function.outputs if v not in inside), None)
        if lost is not None:
            message = f"the output '{lost.name}' of the function {function.name} is made by no node"
            hint = "keep the node that makes it, or let another value be the output"
            raise broken(module, "order", message, f"function {function.domain}.{function.name}", hint=hint)


def _check_nodes(module: Module, graph: Iterable[ir.Node], defined: set[ir.Value], define: _Define) -> None:
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in defined:
                message = f"{_place(node)} reads '{value.name}' before it is defined"
                maker = value.producer()
                hint = "nothing in the graph makes it: insert its node, or keep the one that was removed"
                if maker is not None and maker.graph is not None:
                    hint = f"move {_place(maker)} before it: rewriter.at(node) inserts before that node"
                raise broken(module, "order", message, node, f"%{value.name}", hint=hint)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner = attribute.as_graph()
                inside = defined | {*inner.inputs, *inner.initializers.values()}
                _check_nodes(module, inner, inside, define)
                lost = next((v for v in inner.outputs if v not in inside), None)
                if lost is not None:
                    message = f"the output '{lost.name}' of a graph in {_place(node)} is made by no node"
                    hint = "keep the node that makes it, or let another value be the output"
                    raise broken(module, "order", message, node, f"%{lost.name}", hint=hint)
        for value in node.outputs:
            define(value, f"a result of {_place(node)}", node)
            defined.add(value)


def _check_initializers(module: Module) -> None:
    for name, value in module.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            problem, hint = "has no tensor", "set its const_value, or delete it from the initializers"
        elif value.dtype is not None and value.dtype != tensor.dtype:
            problem, hint = (
                f"is declared {value.dtype}, its tensor is {tensor.dtype}",
                "insert a Cast to change the type",
            )
        elif value.shape is not None and value.shape != tensor.shape:
            problem = f"is declared {value.shape}, its tensor is {tensor.shape}"
            hint = "insert a Reshape or a Transpose to change the shape"
        elif (parts := quantized(tensor)) is not None and (misfit := parts.problem()) is not None:
            problem, hint = misfit, "make codes, scales and zeros of one grid, see qeff_ir.quantized.Quantized"
        else:
            continue
        raise broken(module, "initializer", f"initializer '{name}' {problem}", _line(value), hint=hint)


def _line(initializer: ir.Value) -> str:
    return f"{'weight' if WEIGHT_KEY in initializer.metadata_props else 'const'} {initializer.name}"


def _check_operators(module: Module) -> None:
    model = module.model
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in model.opset_imports:
            message = f"{_place(node)} is of domain '{node.domain}', which is not imported"
            hint = f"set module.model.opset_imports['{node.domain}'] to a version"
            raise broken(module, "operator", message, node, f"{node.domain}.{node.op_type}", hint=hint)
        if node.op_identifier() in model.functions or node.domain not in ("", "ai.onnx.ml"):
            if node.op_identifier() not in model.functions and (node.domain, node.op_type) in operators.known():
                message = f"{_place(node)} has no body in the model"
                hint = "call qeff_ir.ir.operators.attach(module.model) at the end of the pass"
                raise broken(module, "operator", message, node, f"{node.domain}.{node.op_type}", hint=hint)
            continue
        opset = model.opset_imports[node.domain]
        if opset not in _OPSETS or not onnx.defs.has(node.op_type, opset, node.domain):
            message = f"{_place(node)} does not exist in opset {opset}"
            raise broken(module, "operator", message, node, f"{node.op_type}(", hint=_other_operator(node, opset))


_OPSETS = range(2**31)
"""What onnx takes for the number of an opset; files have 64 bits for it."""


def _other_operator(node: ir.Node, opset: int) -> str:
    if onnx.defs.has(node.op_type, node.domain):
        known = [
            s for s in onnx.defs.get_all_schemas_with_history() if (s.name, s.domain) == (node.op_type, node.domain)
        ]
        since = min(s.since_version for s in known)
        return f"it came with opset {since}: raise the opset, or write it with older operators"
    names = {s.name for s in onnx.defs.get_all_schemas() if s.domain == node.domain}
    near = difflib.get_close_matches(node.op_type, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"write it with operators of opset {opset}, or give it a body"


def _check_interface(module: Module) -> None:
    for kind, values in (("input", module.graph.inputs), ("output", module.graph.outputs)):
        for value in values:
            at, name = f"{kind.removesuffix('put')} {value.name}", f"graph {kind} '{value.name}'"
            computed = kind == "output" and not module.states
            if value.dtype is None or (value.shape is None and not computed):
                hint = "a new graph input or output needs both: set its dtype and its shape"
                raise broken(module, "interface", f"{name} has no type or no shape", at, hint=hint)
            for dim in value.shape or ():
                if computed and isinstance(dim, ir.SymbolicDim) and dim.value is None:
                    continue
                if isinstance(dim, ir.SymbolicDim) and dim.value not in module.dims:
                    message = f"{name} has the dim '{dim.value}', which the module does not declare"
                    hint = f"use one of {', '.join(module.dims)}, or add it to module.dims"
                    raise broken(module, "interface", message, at, dim.value or "?", hint=hint)


def _check_residents(module: Module) -> None:
    inputs = {v.name: v for v in module.graph.inputs}
    outputs = {v.name: v for v in module.graph.outputs}
    for state in module.residents:
        line = f"state {state.input}"
        for kind, name, values in zip(("input", "output"), state.names, (inputs, outputs), strict=False):
            value = values.get(name)
            if value is None:
                message = f"the {state.kind} state of layer {state.path or state.layer} has no {kind} '{name}'"
                hint = f"keep the graph {kind}, or drop the state from module.residents with both"
                raise broken(module, "state-pair", message, line, hint=hint)
            if value.dtype != state.dtype or _dims(value) != state.shape:
                message = (
                    f"graph {kind} '{name}' is {value.dtype} {list(_dims(value))}, its state says {state.dtype} "
                    f"{list(state.shape)}"
                )
                hint = "change input, output and state together"
                raise broken(module, "state-pair", message, f"{kind.removesuffix('put')} {name}", hint=hint)
    order, names = [r.order for r in module.residents], [r.input for r in module.residents]
    if len(set(names)) != len(names) or order != sorted(order):
        at = next(i for i in range(1, len(order)) if names[i] in names[:i] or order[i] < order[i - 1])
        message = f"the states are not ordered by layer, key before value, each once: {names}"
        hint = "sort module.residents by Resident.order"
        raise broken(module, "state-kinds", message, f"state {names[at]}", hint=hint)
    paired = {name for resident in module.residents for name in resident.names}
    stray = [n for n in outputs if n and n.endswith(Resident.SUFFIX) and n not in paired]
    if stray:
        message = f"graph output '{stray[0]}' is named like a state, but the module declares none"
        hint = f"the device pairs outputs by the ending {Resident.SUFFIX}: declare a Resident, or choose another name"
        raise broken(module, "state-pair", message, f"out {stray[0]}", f"%{stray[0]}", hint=hint)


def _check_flow(module: Module) -> None:
    """A cache is written onto itself: states whose ends were swapped have the same types, and no other trace."""
    inputs = {v.name: v for v in module.graph.inputs}
    outputs = {v.name: v for v in module.graph.outputs}
    for state in module.residents:
        if state.retained and not _reaches(outputs[state.output], inputs[state.input]):
            message = f"the state output '{state.output}' is not made of its input '{state.input}'"
            hint = "the ends of two states may be swapped: each update reads the input of the state that it writes"
            node = outputs[state.output].producer()
            raise broken(module, "state-flow", message, node or f"out {state.output}", f"%{state.output}", hint=hint)


def _reaches(value: ir.Value, source: ir.Value) -> bool:
    """Whether `value` is computed from `source`; breadth first, for a cache is one step behind its update."""
    queue, seen = deque([value]), {value}
    while queue:
        at = queue.popleft()
        if at is source:
            return True
        node = at.producer()
        found = [v for v in node.inputs if v is not None and v not in seen] if node is not None else []
        seen.update(found)
        queue.extend(found)
    return False


def _dims(value: ir.Value) -> tuple[str | int | None, ...]:
    return tuple(d if isinstance(d, int) else d.value for d in value.shape or ())


def _check_specializations(module: Module) -> None:
    names = [s.name for s in module.specializations]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        message = f"two specializations have the same name: {', '.join(names)}"
        raise broken(module, "dims", message, f"specialization {twice}", hint="give each a name of its own")
    used = {d for v in (*module.graph.inputs, *module.graph.outputs) for d in _dims(v) if isinstance(d, str)}
    for specialization in module.specializations:
        line = f"specialization {specialization.name}"
        for dim in sorted(used):
            if specialization.symbols.get(dim, 0) < 1:
                message = f"specialization {specialization.name} gives no size to '{dim}'"
                hint = "a pass that adds a dim to the interface adds its size, at least 1, to every specialization"
                raise broken(module, "dims", message, line, hint=hint)
        for dim, size in specialization.symbols.items():
            limit = module.dims[dim].maximum if dim in module.dims else None
            if limit is not None and size > limit:
                message = f"specialization {specialization.name} asks for {dim}={size}, the model takes at most {limit}"
                raise broken(module, "bounds", message, line, f"{dim}={size}", hint=f"ask for {limit} or less")
