"""The diff says what changed, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qeff_ir.debug.diff import diff, render
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ir.ports import MASK
from qeff_ir.passing.base import Rewriter
from tests import support

from .models import plain


def test_equal_modules_have_no_difference() -> None:
    module = support.canonical("llama")
    found = diff(module, module.clone())
    assert not found
    assert render(found) == ["no difference"]


def test_a_fusion_is_grouped_by_module_and_pass() -> None:
    before = support.canonical("llama")
    after = before.clone()
    support.apply(after, "fuse-norms,fuse-activations")
    found = diff(before, after)
    assert (found.count("added"), found.node_count) == (7, (len(before.graph), len(after.graph)))
    assert found.interface == ()
    added = [c for c in found.nodes if c.kind == "added"]
    assert {c.source for c in added if c.op == "Swish"} == {f"model.layers.{i}.mlp.act_fn" for i in (0, 1)}
    lines = render(found)
    assert any(line.startswith("model.layers.1.mlp.act_fn, made by ") and "+Swish" in line for line in lines)
    assert sum("+RMSNormalization" in line for line in lines) == 5


def test_changes_are_grouped_by_the_pass_that_made_them() -> None:
    before = support.canonical("llama")
    after = before.clone()
    support.apply(after, "last-logits")
    lines = render(diff(before, after))
    assert "lm_head, made by last-logits: +Cast, +ArgMax, +Unsqueeze, +GatherND" in lines
    assert "lm_head, made by the frontend: ~MatMul" in lines


def test_interface_states_and_dims() -> None:
    before = support.canonical("mistral")
    after = before.clone()
    support.apply(after, "last-logits,kv-retention{layout=tensor-scatter}")
    lines = render(diff(before, after))
    assert "~ output logits: float[batch_size, seq_len, 97] → float[batch_size, 1, 97]" in lines
    assert (
        "~ state past_key.0: float[batch_size, 2, ctx_len, 8], window 6 → "
        "float[batch_size, 2, sliding_window, 8], window 6, ring"
    ) in lines
    assert "+ property states-lowered: holds" in lines
    assert "+ dim sliding_window: any size" in lines


def test_rewiring_names_input_and_attribute(tmp_path: Path) -> None:
    before = plain(tmp_path)
    after = before.clone()
    add = next(n for n in after.graph if n.op_type == "Add")
    add.replace_input_with(0, add.inputs[1])
    add.attributes["note"] = ir.AttrInt64("note", 3)
    (change, *rest) = [c for c in diff(before, after).nodes if c.kind == "rewired"]
    assert not rest
    assert (change.op, change.name, change.detail) == ("Add", "y", "input 0 %r → %h, note unset → 3")


def test_a_renamed_value_is_no_change(tmp_path: Path) -> None:
    before = plain(tmp_path)
    after = before.clone()
    next(n for n in after.graph if n.op_type == "MatMul").outputs[0].name = "other"
    assert not diff(before, after)


def test_modules_of_other_facts_differ(tmp_path: Path) -> None:
    before = support.canonical("llama")
    after = before.clone()
    after.specializations = after.specializations[:1]
    found = diff(before, after)
    assert found and found.facts and not found.nodes and not found.interface
    assert found.facts == ("- specialization Decode: decode batch_size=2 ctx_len=48 seq_len=1",)


def test_roles_of_inputs_and_outputs_are_facts() -> None:
    before = support.canonical("llama")
    after = before.clone()
    support.apply(after, "token-embedding")
    after.ports["position_ids"] = MASK.name
    lines = diff(before, after).facts
    assert [line for line in lines if "port" in line] == [
        "- port input_ids: tokens",
        "+ port inputs_embeds: embeddings",
        "~ port position_ids: positions → mask",
    ]


def test_weights_are_counted_in_bytes(tmp_path: Path) -> None:
    before = plain(tmp_path)
    after = before.clone()
    value = ir.val("v", const_value=ir.tensor(np.zeros((4, 4), np.float32), name="v"))
    value.metadata_props[WEIGHT_KEY] = "v"
    after.graph.register_initializer(value)
    Rewriter(after, "test").constant(np.zeros(2, np.int64))
    found = diff(before, after)
    assert found.weights_added["weight v"] == 64
    assert sum(found.weights_added.values()) == 64 + 16
    assert found.weight_bytes == (1024, 1024 + 80)
    assert "+ weight v (64 bytes)" in render(found)
    assert diff(after, before).weights_removed == found.weights_added
    assert json.loads(json.dumps(found.to_json()))["weight_bytes"] == [1024, 1104]


def test_a_long_group_is_cut_and_counted() -> None:
    before = support.lowered("llama")
    after = before.clone()
    support.apply(after, "canonicalize")
    lines = render(diff(before, after), limit=2)
    assert any(line.startswith("    and ") and line.endswith(" more") for line in lines)
