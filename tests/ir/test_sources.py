"""Sources of nodes: one or several, as metadata, as text, and through saving."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qeff_ir.ir.module import PASS_KEY
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.ir.sources import set_sources, source_text, sources_of
from qeff_ir.passing import Rewriter
from tests import support


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        (["m.0.mlp.gate", "m.0.mlp.up"], "m.0.mlp.gate+up"),
        (["gate", "up"], "gate+up"),
        (["m.0.mlp.up", "m.1.mlp.up"], "m.0.mlp.up+m.1.mlp.up"),
        (["m.a", "lm_head"], "m.a+lm_head"),
        (["m.a + b", "m.c"], "m.a + b+c"),
        (["m.0.mlp.up", "m.0.mlp.gate", "m.0.mlp.up"], "m.0.mlp.up+gate"),
    ],
)
def test_a_node_keeps_each_source_once_and_in_order(paths: list[str], text: str) -> None:
    node = ir.node("Relu", [None])
    assert (sources_of(node), source_text(node)) == ((), "")
    set_sources(node, paths)
    assert (sources_of(node), source_text(node)) == (tuple(dict.fromkeys(paths)), text)


def test_what_is_built_at_several_nodes_has_the_sources_of_all_and_keeps_them_when_saved(tmp_path: Path) -> None:
    module = support.canonical("llama")
    gate, up, down = [
        node for node in module.graph if "layers.1.mlp." in source_text(node) and node.op_type == "MatMul"
    ]
    rewriter = Rewriter(module, "made")
    first = rewriter.at(gate, up)("Identity", gate.inputs[0])
    again = rewriter.after(down, gate)
    last = again("Identity", again("Identity", down.outputs[0]))
    nodes = [value.producer() for value in (first, last)]
    order = list(module.graph)
    assert nodes[0] is order[order.index(gate) - 1] and nodes[1] is order[order.index(down) + 2]
    own = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert [sources_of(node) for node in nodes if node is not None] == [(own[0], own[1]), (own[2], own[0])]
    rewriter.at(first.producer() or gate, down)("Identity", gate.inputs[0])  # a node of several, and another
    assert sources_of(order[order.index(gate)]) == (own[0],)
    text = to_text(module)
    for shown in ("gate_proj+up_proj <- made", "down_proj+gate_proj <- made", "gate_proj+up_proj+down_proj <- made"):
        assert f"; model.layers.1.mlp.{shown}" in text
    path = save_module(module, tmp_path)
    saved = [sources_of(node) for node in load_module(path).graph if node.metadata_props.get(PASS_KEY) == "made"]
    assert saved == [tuple(own), tuple(own[:2]), (own[2], own[0]), (own[2], own[0])]
