"""Operators that ONNX does not have, each with a body that defines its meaning: our dialect's, and those of devices.

One `define` makes an operator known to passes, the verifier and the emulator. A body is an ONNX function, so that any
runtime takes a model that uses it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import OnnxFunction

from qeff_ir.errors import PipelineError

Key = tuple[str, str]
"""Domain and name."""


@dataclass(frozen=True)
class Operator:
    """An operator with what it means.

    Attributes:
        body: Its meaning in ONNX, as a function.
        rule: As a device that has the operator runs it, where it is more than the body says (what an index out of range
            does); the body itself where it is not. `None` for an operator of our dialect, which no device has.
    """

    body: OnnxFunction[..., Any]
    rule: OnnxFunction[..., Any] | None = None

    @property
    def key(self) -> Key:
        """Domain and name."""
        return self.body.domain, self.body.name

    @property
    def version(self) -> int:
        """Version of the domain."""
        return self.body.opset.version


_OPERATORS: dict[Key, Operator] = {}


def define(body: OnnxFunction[..., Any], *, rule: OnnxFunction[..., Any] | None = None) -> Operator:
    """Make an operator known.

    Args:
        body: An onnxscript function, which has the operator's domain and name.
        rule: As the device runs it (see `Operator`).

    Raises:
        PipelineError: Another operator has the domain and name, or the domain is ONNX's own.
    """
    operator = Operator(body, rule)
    domain, name = operator.key
    if domain == "" or operator.key in _OPERATORS:
        what = "is ONNX's own" if domain == "" else "is defined twice"
        raise PipelineError(f"the operator {name} of the domain '{domain}' {what}: choose another domain or name")
    _OPERATORS[operator.key] = operator
    return operator


def known() -> Mapping[Key, Operator]:
    """All operators by domain and name: our dialect's, and those of targets and plug-ins that are imported."""
    importlib.import_module("qeff_ir.ir.dialect")  # by name: it defines its operators here
    return _OPERATORS


@functools.cache
def _function(operator: Operator) -> ir.Function:
    return ir.serde.deserialize_function(operator.body.to_function_proto())


def attach(model: ir.Model) -> None:
    """Give the model the bodies of the operators that it uses, and only those.

    A body is in the model's standard opset, or in its own where that is newer.
    """
    operators = known()
    graphs = (model.graph, *(f.graph for f in model.functions.values() if (f.domain, f.name) not in operators))
    nodes = (node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph))
    called = {(node.domain, node.op_type) for node in nodes}
    used, domains = called & operators.keys(), {domain for domain, _ in called}
    for identifier in [i for i in model.functions if i[:2] in operators and i[:2] not in used]:
        del model.functions[identifier]
    for domain in {d for d, _ in operators} - domains:
        model.opset_imports.pop(domain, None)
    for key in sorted(used):
        model.opset_imports[key[0]] = operators[key].version
        body = _function(operators[key])
        opset = max(body.opset_imports[""], model.opset_imports.get("", 0))
        present = model.functions.get(body.identifier())
        if present is None or present.opset_imports.get("") != opset:
            body = body.clone()
            body.opset_imports[""] = opset
            model.functions[body.identifier()] = body


def give_rules(proto: onnx.ModelProto, *, unread: float = 0.0) -> None:
    """Put the rules of operators in the place of their bodies, where there are some.

    Args:
        proto: The model.
        unread: What a rule gives where it reads nothing: the default of its attribute ``unread``, if it has one.
            Devices promise nothing. NaN shows in the results of a graph that looks at it; standard attention looks at
            hidden keys, so that one which is not lowered yet needs a number.
    """
    for function in proto.functions:
        operator = known().get((function.domain, function.name))
        if operator is not None and operator.rule is not None:
            name, domain = function.name, function.domain
            function.CopyFrom(operator.rule.to_function_proto())
            function.name, function.domain = name, domain  # those of the rule are its author's
            for default in function.attribute_proto:
                if default.name == "unread":
                    default.f = unread
