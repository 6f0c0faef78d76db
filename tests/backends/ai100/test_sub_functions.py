"""Layers that stay functions: one body a kind, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from backends.ai100 import contract, sub_functions
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from qeff_ir import numerics
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import attribute_text
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.matching import scalar
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.trace import compare, session_trace
from tests import support

OPTIONS = Ai100Options(prefill_seq_len=8, ctx_len=48, batch_size=2, flags={"sub_functions": True})

SHARED = ["position_ids"]


def finished(name: str) -> Module:
    """A module as it is emitted."""
    module = support.canonical(name)
    support.apply(module, support.rest_of("ai100"))
    return module


def calls(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == sub_functions.DOMAIN]


def digest(model: ir.Model) -> tuple[Any, ...]:
    """What a graph computes, node for node, whatever its values are called and in whatever order its nodes stand."""
    known: dict[ir.Value | None, str] = {None: "-"} | {v: v.name or "" for v in model.graph.inputs}
    known |= {v: v.const_value.tobytes().hex() for v in model.graph.initializers.values() if v.const_value is not None}
    nodes: list[str] = []
    for node in model.graph:
        if node.op_type == "Constant":
            tensor = node.attributes["value"].as_tensor()
            known[node.outputs[0]] = tensor.tobytes().hex()
            continue
        attributes = sorted(f"{a.name}={attribute_text(a)}" for a in node.attributes.values())
        told = str(hash((node.op_identifier(), *attributes, *(known[v] for v in node.inputs))))
        nodes.append(told)
        known |= {v: f"{told}.{i}" for i, v in enumerate(node.outputs)}
    return sorted(nodes), [(v.name, known[v]) for v in model.graph.outputs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", [0, 0]), ("bloom", [0, 0, 0]), ("gemma3", [0, 0, 1]), ("falcon-h1", [0, 0]), ("mixtral", [0, 0])],
)
def test_layers_of_a_kind_share_a_body_and_inlining_gives_the_graph_back(name: str, expected: list[int]) -> None:
    module = finished(name)
    outlined = module.model.clone()
    assert sub_functions.outline(outlined, SHARED) == len(expected)
    assert calls(outlined) == [f"DecoderLayer{kind}" for kind in expected]
    assert {f.name for f in outlined.functions.values() if f.domain == sub_functions.DOMAIN} == set(calls(outlined))
    for domain, function, overload in [k for k in outlined.functions if k[0] != sub_functions.DOMAIN]:
        del outlined.functions[domain, function, overload]  # the device's ops stay calls
    common.InlinePass()(outlined)
    assert digest(outlined) == digest(module.model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1"])
def test_a_package_with_functions_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    module = finished(name)
    BACKEND.emit(module, tmp_path, OPTIONS)
    assert list(contract.violations(tmp_path)) == []
    assert calls(module.model) == []  # the module is left alone
    (file,) = tmp_path.glob("*.onnx")
    proto = onnx.load(str(file), load_external_data=False)
    assert len([n for n in proto.graph.node if n.domain == sub_functions.DOMAIN]) >= 2
    reference = support.reference(name)
    trace = session_trace(Decoder(BACKEND.open(tmp_path, threads=1)), support.PROMPTS, reference.tokens)
    assert compare(trace, reference).equal(numerics.bound(numerics.depth(support.lowered(name))))


def other_axis(module: Module) -> None:
    nodes = [n for n in module.graph if n.op_type == "Softmax"]
    nodes[1].attributes["axis"] = ir.AttrInt64("axis", 1)


def other_epsilon(module: Module) -> None:
    nodes = [n for n in module.graph if n.op_type == "CustomRMSNorm"]
    nodes[2].attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def other_scale(module: Module) -> None:
    """As models have it that scale scores by the number of the layer."""
    scaled = [n for n in module.graph if n.op_type == "Mul" and scalar(n.inputs[1]) == np.float32(8**-0.5)]
    assert len(scaled) == 2
    b = Rewriter(module, "test").at(scaled[1])
    scaled[1].replace_input_with(1, b.const(0.25, np.float32))


@pytest.mark.parametrize("change", [other_axis, other_epsilon, other_scale])
def test_a_layer_that_differs_has_a_body_of_its_own(change: Callable[[Module], None]) -> None:
    module = finished("llama")
    change(module)
    sub_functions.outline(module.model, SHARED)
    assert calls(module.model) == ["DecoderLayer0", "DecoderLayer1"]


def test_a_layer_that_is_left_and_entered_again_stays_as_it_is() -> None:
    module = finished("llama")
    first = next(n for n in module.graph if n.op_type == "Softmax")
    first.metadata_props["qeff.source"] = ""
    assert sub_functions.outline(module.model, SHARED) == 1
