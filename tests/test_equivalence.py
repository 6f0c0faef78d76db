"""The main matrix: every architecture, compiled without a line that knows it, answers as transformers does.

Chunked prefill of unequal prompts (one longer than two chunks, one shorter than a chunk), then enough decode steps to
pass the window's edge, the ring's end and a chunk's edge in both rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from backends import backend_names
from qeff_ir import QEFFAutoModelForCausalLM, numerics
from qeff_ir.errors import PassError
from qeff_ir.ir import dialect
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.matching import made_by
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.trace import compare, session_trace
from tests import support
from tests.models import MODELS, WINDOW
from tests.support import OPTIONS, PROMPTS, STEPS

KILL_FACTOR = 100.0
"""How far above the bound a planted fault must show."""


def limit(module: Module) -> float:
    return numerics.bound(numerics.depth(module))


@pytest.mark.parametrize("target", backend_names())
@pytest.mark.parametrize("name", MODELS)
def test_matches_transformers(name: str, target: str, record_property: Callable[[str, object], None]) -> None:
    model = QEFFAutoModelForCausalLM._opened(support.Lowered(name))
    model.compile(target=target, batch_size=2, prefill_seq_len=8, ctx_len=48, emit_only=target != "onnxruntime")
    reference = support.reference(name)
    comparison = compare(session_trace(model.runner(threads=1).decoder, PROMPTS, reference.tokens), reference)
    bound = limit(support.lowered(name))
    record_property("error", comparison.error)
    record_property("bound", bound)
    assert comparison.agreement == STEPS
    assert comparison.error <= bound


def test_a_second_request_starts_afresh(tmp_path: Path) -> None:
    decoder = support.open_decoder(support.canonical("mistral"), tmp_path)
    reference = support.reference("mistral")
    first = session_trace(decoder, support.prompts([30, 17], seed=8), np.full((8, 2), 7))
    again = session_trace(decoder, PROMPTS, reference.tokens)
    assert not np.array_equal(first.tokens[:8], again.tokens[:8])
    assert compare(again, reference).equal(limit(support.lowered("mistral")))


@pytest.mark.parametrize("name", MODELS)
def test_the_windows_are_those_of_the_model(name: str) -> None:
    states = support.lowered(name).states
    assert {s.layer for s in states if s.window is not None} == set(MODELS[name].windowed)
    assert all(s.window in (None, WINDOW) for s in states)


def test_depth_counts_the_products_in_a_row() -> None:
    """q/k/v, two in attention, the output, up and down: six a layer, and the head; a router is one more."""
    assert numerics.depth(support.lowered("llama")) == 6 * 2 + 1
    assert numerics.depth(support.lowered("bloom")) == 6 * 3 + 1
    assert numerics.depth(support.lowered("gemma3")) == 6 * 3 + 1
    assert numerics.depth(support.lowered("mixtral")) == 7 * 2 + 1


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek-v3"])
def test_passes_keep_the_depth(name: str) -> None:
    module = support.canonical(name)
    before = numerics.depth(support.lowered(name))
    assert numerics.depth(module) == before
    support.apply(module, support.rest_of("onnxruntime"))
    assert numerics.depth(module) == before


# Planted faults. Each changes a canonical module that, unchanged, passes the matrix above; the trace must tell.


def attentions(module: Module) -> list[ir.Node]:
    found = [n for n in module.graph if n.op_type in ("Attention", "SinkAttention")]
    assert len(found) == len(module.states) // 2
    return found


def scalars(module: Module, number: float) -> list[ir.Value]:
    """Constants of one element that hold `number`."""
    found = []
    for value in module.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and tensor.size == 1 and tensor.numpy().reshape(()) == number:
            found.append(value)
    assert found, f"no constant {number}"
    return found


def set_number(values: list[ir.Value], number: float) -> None:
    for value in values:
        assert value.const_value is not None
        old = value.const_value.numpy()
        value.const_value = ir.tensor(np.full(old.shape, number, old.dtype), name=value.name)


def window_too_wide(module: Module) -> None:
    _shift_window(module, 1)


def window_too_narrow(module: Module) -> None:
    _shift_window(module, -1)


def _shift_window(module: Module, by: int) -> None:
    """Masks compare a key's position with ``q - window``."""
    for number in (WINDOW, -WINDOW):
        found = [
            v
            for v in module.graph.initializers.values()
            if isinstance(v.const_value, ir.Tensor)
            and v.const_value.size == 1
            and v.dtype == ir.DataType.INT64
            and v.const_value.numpy().reshape(()) == number
        ]
        if found:
            set_number(found, number + by if number > 0 else number - by)
            return
    raise AssertionError("no window in the graph")


def scale_dropped(module: Module) -> None:
    for node in attentions(module):
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def scale_of_one_layer(module: Module) -> None:
    node = attentions(module)[1]
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.05)


def keys_for_values(module: Module) -> None:
    node = attentions(module)[1]
    node.replace_input_with(2, node.inputs[1])


def keys_and_values_swapped(module: Module) -> None:
    node = attentions(module)[0]
    key, value = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def mask_sign(module: Module) -> None:
    node = attentions(module)[0]
    node.replace_input_with(3, Rewriter(module, "fault").at(node)("Not", node.inputs[3]))


def no_mask(module: Module) -> None:
    for node in attentions(module):
        b = Rewriter(module, "fault").at(node)
        node.replace_input_with(3, b("Or", node.inputs[3], b("Not", node.inputs[3])))


def softcap_dropped(module: Module) -> None:
    for node in attentions(module):
        assert node.attributes["softcap"].as_float() > 0.0
        node.attributes["softcap"] = ir.AttrFloat32("softcap", 0.0)


def final_softcap_moved(module: Module) -> None:
    set_number(scalars(module, 3.0), 3.1)


def sinks_dropped(module: Module) -> None:
    for node in attentions(module):
        sinks = node.inputs[4]
        assert sinks is not None and sinks.shape is not None
        none = Rewriter(module, "fault").constant(np.full(sinks.shape.numpy(), -60000.0, np.float32))
        node.replace_input_with(4, none)


def state_not_written(module: Module) -> None:
    """Layer 1 attends to this run's tokens, but hands the old keys on."""
    state = next(s for s in module.states if s.layer == 1 and s.kind == "key")
    index = next(i for i, v in enumerate(module.graph.outputs) if v.name == state.output)
    old = module.graph.outputs[index]
    node = old.producer()
    assert node is not None
    kept = Rewriter(module, "fault").at(node)("Identity", node.inputs[0], shape=old.shape, dtype=old.dtype)
    old.name, kept.name = None, state.output
    module.graph.outputs[index] = kept


def states_of_two_layers_swapped(module: Module) -> None:
    one, two = (
        n
        for n in module.graph
        if n.op_type == "CacheUpdate" and (old := n.inputs[0]) is not None and (old.name or "").startswith("past_key")
    )
    past = one.inputs[0], two.inputs[0]
    one.replace_input_with(0, past[1])
    two.replace_input_with(0, past[0])


def heads_grouped_wrongly(module: Module) -> None:
    """Query heads 0, 2 on the first key/value head and 1, 3 on the second: strided instead of blocked groups."""
    node = attentions(module)[0]
    b = Rewriter(module, "fault").at(node)
    query = node.inputs[0]
    assert query is not None
    node.replace_input_with(0, b("Gather", query, b.const([0, 2, 1, 3]), axis=1, shape=query.shape, dtype=query.dtype))


def rotation_backwards(module: Module) -> None:
    site = next(n for n in module.graph if n.op_type == "Concat" and made_by(n.inputs[0], "Neg") is not None)
    negation = made_by(site.inputs[0], "Neg")
    assert negation is not None
    b = Rewriter(module, "fault").at(site)
    first, second = negation.inputs[0], site.inputs[1]
    assert second is not None
    site.replace_input_with(0, first)
    site.replace_input_with(1, b("Neg", second, shape=second.shape, dtype=second.dtype))


def no_position_bias(module: Module) -> None:
    """ALiBi: one slope a head, times the position of the key."""
    slopes = [
        v
        for v in module.graph.initializers.values()
        if v.const_value is not None
        and tuple(v.const_value.shape.numpy()) == (4, 1, 1)
        and v.const_value.numpy()[0] == 0.25
    ]
    assert len(slopes) == 1
    slopes[0].const_value = ir.tensor(np.zeros((4, 1, 1), np.float32), name=slopes[0].name)


def one_block_skipped(module: Module) -> None:
    """The last residual sum takes only the stream."""
    total = [n for n in module.graph if n.op_type == "Add" and len(n.outputs[0].shape or ()) == 3][-1]
    stream = total.inputs[0]
    assert stream is not None
    total.outputs[0].replace_all_uses_with(stream)


def nodes(module: Module, op_type: str) -> list[ir.Node]:
    found = [n for n in module.graph if n.op_type == op_type]
    assert found
    return found


def _forget(module: Module, node: ir.Node, index: int) -> None:
    past = node.inputs[index]
    assert past is not None
    b = Rewriter(module, "fault").at(node)
    nothing = b("Mul", past, b.const(0.0, np.float32), shape=past.shape, dtype=past.dtype)
    node.replace_input_with(index, nothing)


def _keep_padding(module: Module, node: ir.Node, index: int) -> None:
    """Padding, whose position is -1, looks like a token."""
    positions = node.inputs[index]
    assert positions is not None
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(index, b("Abs", positions, shape=positions.shape, dtype=positions.dtype))


def recurrent_state_forgotten(module: Module) -> None:
    _forget(module, nodes(module, "LinearAttention")[0], 5)


def window_forgotten(module: Module) -> None:
    _forget(module, nodes(module, "StateWindow")[0], 0)


def padding_in_the_state(module: Module) -> None:
    for node in nodes(module, "LinearAttention"):
        _keep_padding(module, node, 6)


def padding_in_the_window(module: Module) -> None:
    _keep_padding(module, nodes(module, "StateNext")[0], 1)


def delta_rule_dropped(module: Module) -> None:
    for node in nodes(module, "LinearAttention"):
        assert node.attributes["delta"].as_float() == 1.0
        node.attributes["delta"] = ir.AttrFloat32("delta", 0.0)


def stored_mask_ignored(module: Module) -> None:
    """The layer with a window sees all that the causal mask lets it see."""
    node = [n for n in nodes(module, "GatherND") if n.outputs[0].dtype == ir.DataType.BOOL][-1]
    table = node.inputs[0]
    assert table is not None
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(0, b("Or", table, b.const(True, np.bool_), shape=table.shape, dtype=table.dtype))


def distances_off_by_one(module: Module) -> None:
    node = next(n for n in nodes(module, "Sub") if len(n.outputs[0].shape or ()) == 3)
    assert node.outputs[0].dtype == ir.DataType.INT64
    b = Rewriter(module, "fault").at(node)
    rows = node.inputs[0]
    assert rows is not None
    node.replace_input_with(0, b("Add", rows, b.const(1, np.int64), shape=rows.shape, dtype=rows.dtype))


FAULTS: list[tuple[str, support.Mutation]] = [
    ("mistral", window_too_wide),
    ("mistral", window_too_narrow),
    ("gemma2", window_too_wide),
    ("gemma3", window_too_narrow),
    ("gpt-oss", window_too_wide),
    ("llama", scale_dropped),
    ("llama", scale_of_one_layer),
    ("gemma2", scale_dropped),
    ("qwen3", keys_for_values),
    ("llama", keys_and_values_swapped),
    ("llama", mask_sign),
    ("qwen2", no_mask),
    ("gemma2", softcap_dropped),
    ("gemma2", final_softcap_moved),
    ("gpt-oss", sinks_dropped),
    ("llama", state_not_written),
    ("mistral", state_not_written),
    ("phi3", heads_grouped_wrongly),
    ("llama", rotation_backwards),
    ("bloom", no_position_bias),
    ("llama", one_block_skipped),
    ("gpt2", one_block_skipped),
    ("gpt-neo", stored_mask_ignored),
    ("inkling", distances_off_by_one),
    ("mamba", recurrent_state_forgotten),
    ("qwen3-next", recurrent_state_forgotten),
    ("mamba", window_forgotten),
    ("falcon-h1", padding_in_the_state),
    ("qwen3-next", padding_in_the_window),
    ("qwen3-next", delta_rule_dropped),
]


@pytest.mark.parametrize(("name", "fault"), [pytest.param(n, f, id=f"{n}-{f.__name__}") for n, f in FAULTS])
def test_a_planted_fault_is_caught(
    name: str, fault: support.Mutation, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    module = support.canonical(name)
    fault(module)
    reference = support.reference(name)
    comparison = compare(session_trace(support.open_decoder(module, tmp_path), PROMPTS, reference.tokens), reference)
    record_property("error/bound", comparison.error / limit(support.lowered(name)))
    assert comparison.error > KILL_FACTOR * limit(support.lowered(name))


def test_swapped_states_do_not_come_as_far_as_a_run(tmp_path: Path) -> None:
    module = support.canonical("llama")
    states_of_two_layers_swapped(module)
    with pytest.raises(
        PassError, match=r"\[state-flow\] the state output 'past_key.0_RetainedState' is not made of its"
    ):
        support.open_decoder(module, tmp_path)


class _Stuck(Decoder):
    """Does not advance the position after a decode step."""

    def decode(self, tokens: Any, lora_ids: Any = None) -> np.ndarray:
        before = self.positions.copy()
        logits = super().decode(tokens, lora_ids)
        self.positions = before
        return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bart", "roberta", "roformer", "inkling"])
def test_a_position_that_is_not_advanced_is_caught(name: str, tmp_path: Path) -> None:
    reference = support.reference(name)
    decoder = support.open_decoder(support.canonical(name), tmp_path)
    comparison = compare(session_trace(_Stuck(decoder.session), PROMPTS, reference.tokens), reference)
    bound = limit(support.lowered(name))
    assert max(comparison.errors[:2]) <= bound  # the first step is right, then it is stuck
    assert comparison.error > KILL_FACTOR * bound


@pytest.mark.parametrize("ring", ["auto", "off"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_both_lengths_of_windowed_caches_agree(name: str, ring: str, tmp_path: Path) -> None:
    module = support.canonical(name)
    text = support.rest_of("onnxruntime").replace("{layout=tensor-scatter}", f"{{layout=tensor-scatter ring={ring}}}")
    decoder = support.open_decoder(module, tmp_path, text)
    assert any(s.ring for s in module.states) == (ring == "auto")
    reference = support.reference(name)
    assert compare(session_trace(decoder, PROMPTS, reference.tokens), reference).equal(limit(support.lowered(name)))


def test_the_dialect_itself_runs(tmp_path: Path) -> None:
    """A snapshot between two passes, with dialect ops in it, gives the same logits as the final graph."""
    module = support.canonical("gpt-oss")
    assert {n.op_type for n in module.graph if n.domain == dialect.DOMAIN} >= {"CacheUpdate", "SinkAttention"}
    ids = np.array(support.prompts([7, 7]), dtype=np.int64)
    positions = np.tile(np.arange(7), (2, 1))
    sizes = {"batch_size": 2, "ctx_len": OPTIONS.ctx_len}
    feeds = {"input_ids": ids, "position_ids": positions}
    feeds |= {
        s.input: np.zeros([sizes[d] if isinstance(d, str) else d for d in s.shape], np.float32) for s in module.states
    }
    logits = support.run_graph(module, tmp_path / "a", feeds)["logits"][:, -1]
    decoder = support.open_decoder(module, tmp_path / "b")
    error = numerics.error_over_rms(decoder.prefill(ids.tolist()), logits)
    assert error <= limit(support.lowered("gpt-oss"))
