"""Each pass fires where it should, as often as it should, and keeps the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from backends import find_backend
from qeff_ir import numerics
from qeff_ir.errors import PassError
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.manager import Report, run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import prepare
from tests import support
from tests.models import MODELS, VOCAB
from tests.passes.bends.editing import replace_logits
from tests.properties import LONG, RICH
from tests.support import OPTIONS

SIZES = {"batch_size": 2, "seq_len": OPTIONS.prefill_seq_len, "ctx_len": OPTIONS.ctx_len}

FIRED: dict[str, dict[str, dict[str, int]]] = {
    "llama": {
        "fuse-norms": {"RMSNormalization": 5}, "fuse-rotary": {"RotaryEmbedding": 4}, "fuse-activations": {"Swish": 2},
        "kv-retention": {"CachePositions": 1, "TensorScatter": 4}, "attention": {},
        "ort-attention": {"GroupQueryAttention": 2}, "ort-rotary": {}, "ort-packed-attention": {},
        "fuse-products": {"2 products": 2, "3 products": 2},
        "ort-kernels": {"FusedMatMul": 9, "QuickGelu": 2},
    },
    "gpt2": {
        "unflatten": {"Gemm": 8}, "fuse-norms": {}, "fuse-rotary": {}, "fuse-activations": {"Gelu tanh": 2},
        "ort-attention": {"GroupQueryAttention": 2}, "ort-kernels": {"FusedMatMul": 1}, "fuse-products": {},
        "ort-packed-attention": {"GroupQueryAttention": 2},
    },
    "qwen3": {
        "fuse-norms": {"RMSNormalization": 9}, "fuse-rotary": {"RotaryEmbedding": 4},
        "ort-rotary": {"RotaryEmbedding": 2},
    },
    "mistral": {"kv-retention": {"CachePositions": 1, "TensorScatter ring": 4}, "ort-attention": {}},
    "gemma2": {
        "fuse-norms": {"RMSNormalization": 9}, "fuse-activations": {"Gelu tanh": 2},
        "kv-retention": {"CachePositions": 2, "TensorScatter ring": 2, "TensorScatter": 2},
        "ort-attention": {"GroupQueryAttention": 1},
    },
    "gemma3": {"fuse-norms": {"RMSNormalization": 19}, "fuse-rotary": {"RotaryEmbedding": 6}},
    "gpt-oss": {
        "attention": {"sinks": 2}, "ort-attention": {},
        "kv-retention": {"CachePositions": 2, "TensorScatter ring": 2, "TensorScatter": 2},
    },
    "bloom": {"fuse-activations": {"Gelu tanh": 3}, "kv-retention": {"CachePositions": 1, "TensorScatter": 6}},
    "deepseek-v3": {"fuse-norms": {"RMSNormalization": 9}, "fuse-activations": {"Swish": 3}, "ort-attention": {}},
}  # fmt: skip
"""Rewrites by model, pass and rule; every count is one that the architecture explains."""


def run_all(name: str) -> Report:
    module = support.lowered(name)
    specialize(module, OPTIONS)
    return support.apply(module, f"{support.CANONICAL},{support.rest_of('onnxruntime')}")


@pytest.mark.parametrize("name", FIRED)
def test_passes_fire_as_often_as_the_architecture_has_sites(name: str) -> None:
    report = run_all(name)
    fired = {r.id: dict(r.stats.fired) for r in report.runs}
    assert {p: fired[p] for p in FIRED[name]} == FIRED[name]
    assert fired["last-logits"] == {"selection": 1}


def test_windowed_attention_is_reported_as_missed_by_the_causal_kernel() -> None:
    report = run_all("mistral")
    (run,) = [r for r in report.runs if r.id == "ort-attention"]
    assert [m.source for m in run.stats.missed] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all("ring" in m.reason for m in run.stats.missed)


# The numbers before and after one pass, on the same inputs, ONNX Runtime's own rewriting off.

STEPS = ["unflatten", "fuse-norms", "fuse-rotary", "fuse-activations", "attention{impl=grouped}", "ort-kernels"]
"""Passes that keep the interface, in an order that works."""


def agree(before: dict[str, np.ndarray], after: dict[str, np.ndarray], real: np.ndarray, limit: float) -> None:
    assert before.keys() == after.keys()
    for name, expected in before.items():
        got = after[name]
        if name == "logits":  # what stands at padding means nothing
            expected, got = expected[real], got[real]
        error = numerics.error_over_rms(got, expected)
        assert error <= limit, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_keeps_the_numbers(name: str, tmp_path: Path) -> None:
    module = support.lowered(name)
    support.apply(module, "canonicalize")
    limit = numerics.bound(numerics.depth(module))
    feeds = support.random_feeds(module, SIZES)
    real = feeds["position_ids"] >= 0
    before = support.run_graph(module, tmp_path / "canonicalize", feeds)
    for number, step in enumerate(STEPS):
        support.apply(module, step)
        after = support.run_graph(module, tmp_path / str(number), feeds)
        agree(before, after, real, limit)
        before = after


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_canonicalization_keeps_the_numbers(name: str, tmp_path: Path) -> None:
    module = support.lowered(name)
    feeds = support.random_feeds(module, SIZES)
    before = support.run_graph(module, tmp_path / "a", feeds)
    support.apply(module, "canonicalize")
    after = support.run_graph(module, tmp_path / "b", feeds)
    agree(before, after, feeds["position_ids"] >= 0, numerics.bound(numerics.depth(module)))


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_canonical_graphs_have_what_the_pass_guarantees(name: str) -> None:
    graph = support.canonical(name).graph
    constants = {v for v in graph.initializers.values() if WEIGHT_KEY not in v.metadata_props}
    contents = [(v.dtype, tuple(v.shape or ()), v.const_value.numpy().tobytes()) for v in constants if v.const_value]
    assert len(set(contents)) == len(constants) > 5
    for node in graph:
        assert node.op_type not in ("Identity", "Constant") or node.outputs[0].is_graph_output()
        assert not set(node.inputs) <= constants, f"{node.op_type} could have been computed"
        target = node.inputs[1] if node.op_type == "Reshape" else None
        if target is not None and target.const_value is None:
            (before, after) = ((v.shape.dims if v and v.shape else ()) for v in (node.inputs[0], node.outputs[0]))
            free = [d for axis, d in enumerate(after) if not isinstance(d, int) and d not in before[axis : axis + 1]]
            assert len(free) > 1, f"{before} to {after} needs no computed target"


@pytest.mark.parametrize("first", [False, True], ids=["behind", "first"])
@pytest.mark.parametrize(
    ("op_type", "constant", "left"),
    [
        *(("Add", 0.0, 0), ("Add", 1e-8, 1), ("Sub", 0.0, 0), ("Sub", -1e-8, 1)),
        *(("Mul", 1.0, 0), ("Mul", 1.000001, 1), ("Div", 1.0, 0), ("Div", 1.000001, 1)),
    ],
)
def test_only_what_changes_nothing_is_taken_out(op_type: str, constant: float, left: int, first: bool) -> None:
    module = support.canonical("llama")
    count = sum(n.op_type == op_type for n in module.graph)
    power = next(n for n in module.graph if n.op_type == "Pow")
    b = Rewriter(module, "test").at(power)
    x = power.inputs[0]
    assert x is not None
    number = b.const(constant, np.float32)
    power.replace_input_with(0, b(op_type, *((number, x) if first else (x, number)), shape=x.shape, dtype=x.dtype))
    support.apply(module, "canonicalize")
    kept = left or (first and op_type in ("Sub", "Div"))  # 0 - x and 1 / x are other numbers
    assert sum(n.op_type == op_type for n in module.graph) == count + kept


def test_the_last_token_is_found_at_any_position(tmp_path: Path) -> None:
    """The pass compares positions in fewer bits than they come in."""
    module = support.canonical("llama")
    sizes = {**SIZES, "ctx_len": 2**17 + 8}
    feeds = support.random_feeds(module, sizes)
    for row, first in enumerate((125, 2**17 - 3)):  # the numbers of eight and of sixteen bits end between
        feeds["position_ids"][row] = np.arange(first, first + SIZES["seq_len"])
    feeds["position_ids"][1, 5:] = -1
    before = support.run_graph(module, tmp_path / "a", feeds)["logits"]
    support.apply(module, "last-logits")
    after = support.run_graph(module, tmp_path / "b", feeds)["logits"]
    limit = numerics.bound(numerics.depth(module))
    for row, last in enumerate((7, 4)):
        assert numerics.error_over_rms(after[row, 0], before[row, last]) <= limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_last_logits_are_those_of_each_rows_last_token(name: str, seed: int, tmp_path: Path) -> None:
    module = support.canonical(name)
    feeds = support.random_feeds(module, SIZES, seed)
    positions = feeds["position_ids"]
    positions[0, np.random.default_rng(seed).integers(1, 8) :] = -1
    before = support.run_graph(module, tmp_path / "a", feeds)["logits"]
    support.apply(module, "last-logits")
    after = support.run_graph(module, tmp_path / "b", feeds)["logits"]
    assert after.shape == (2, 1, 97)
    last = positions.argmax(axis=1)
    assert last[0] != last[1]
    limit = numerics.bound(numerics.depth(module))
    for row in range(2):
        assert numerics.error_over_rms(after[row, 0], before[row, last[row]]) <= limit
        neighbor = before[row, last[row] - 1]
        assert numerics.error_over_rms(after[row, 0], neighbor) > 1e3 * limit


def test_logits_may_be_scaled_by_what_weights_make(tmp_path: Path) -> None:
    """As a head with learned scales computes them, from a weight and a number."""
    module = support.canonical("llama")

    def scale(b: OpBuilder, old: ir.Value) -> ir.Value:
        learned = np.random.default_rng(4).random(97, dtype=np.float32) + 0.5
        return b("Mul", old, b("Mul", b.const(learned, np.float32), b.const(20.0, np.float32)))

    replace_logits(module, scale)
    feeds = support.random_feeds(module, SIZES)
    feeds["position_ids"][0, 5:] = -1
    before = support.run_graph(module, tmp_path / "a", feeds)["logits"]
    support.apply(module, "last-logits")
    after = support.run_graph(module, tmp_path / "b", feeds)["logits"]
    assert after.shape == (2, 1, 97)
    limit = numerics.bound(numerics.depth(module))
    for row, last in enumerate(feeds["position_ids"].argmax(axis=1)):
        assert numerics.error_over_rms(after[row, 0], before[row, last]) <= limit


@pytest.mark.parametrize("impl", ["grouped", "standard"])
def test_both_forms_of_attention_agree(impl: str, tmp_path: Path) -> None:
    module = support.canonical("gemma2")
    feeds = support.random_feeds(module, SIZES)
    before = support.run_graph(module, tmp_path / "a", feeds)
    (run,) = support.apply(module, f"attention{{impl={impl}}}").runs
    assert run.stats.fired == ({"grouped": 2} if impl == "grouped" else {})
    limit = numerics.bound(numerics.depth(module))
    agree(before, support.run_graph(module, tmp_path / "b", feeds), feeds["position_ids"] >= 0, limit)


def test_grouped_attention_copies_no_keys() -> None:
    """Two products a layer more than the weights', and nothing that repeats a cache."""
    module = support.canonical("llama")
    repeats = sum(n.op_type in ("Expand", "Tile") for n in module.graph)
    support.apply(module, "attention")
    assert "Attention" not in {n.op_type for n in module.graph}
    assert sum(n.op_type == "MatMul" for n in module.graph) == 15 + 4
    assert sum(n.op_type in ("Expand", "Tile") for n in module.graph) == repeats


def test_half_range_clip() -> None:
    module = support.canonical("llama")
    wide = np.array([1e9, -1e9, np.inf, -np.inf, 5.0], np.float32)
    for name, numbers in (("wide", wide), ("narrow", np.array([1.0, -65504.0], np.float32))):
        module.graph.register_initializer(ir.val(name, const_value=ir.tensor(numbers, name=name)))
    (run,) = support.apply(module, "fp16-clip").runs
    assert run.stats.fired == {"constant": 1}
    clipped, kept = (module.graph.initializers[n].const_value for n in ("wide", "narrow"))
    assert clipped is not None and clipped.numpy().tolist() == [65504.0, -65504.0, 65504.0, -np.inf, 5.0]
    assert kept is not None and kept.numpy().tolist() == [1.0, -65504.0]


def test_constants_are_clipped_one_by_one() -> None:
    """As far as a bisection lets them."""
    for budget in (0, 1, 2):
        module = support.canonical("llama")
        wide = [ir.val(n, const_value=ir.tensor(np.full(3, 1e9, np.float32), name=n)) for n in ("one", "two")]
        for value in wide:
            module.graph.register_initializer(value)
        run_pipeline(module, Pipeline.parse("fp16-clip"), budgets={"fp16-clip": budget})
        assert sum(v.const_value.numpy()[0] == 65504.0 for v in wide if v.const_value is not None) == budget


@pytest.mark.parametrize("number", [-65505.0, -3.4e38, 65505.0, np.inf])
def test_one_number_out_of_range_on_either_side_is_clipped(number: float) -> None:
    """Masks hide with the least float alone."""
    module = support.canonical("llama")
    array = np.array([0.0, number], np.float32)
    module.graph.register_initializer(ir.val("one", const_value=ir.tensor(array, name="one")))
    support.apply(module, "fp16-clip")
    clipped = module.graph.initializers["one"].const_value
    assert clipped is not None and clipped.numpy().tolist() == [0.0, np.sign(number) * 65504.0]


def test_weights_are_clipped_only_when_asked() -> None:
    for text, expected in (("fp16-clip", 1e9), ("fp16-clip{weights=true}", 65504.0)):
        module = support.canonical("llama")
        value = module.graph.initializers["model.norm.weight"]
        assert WEIGHT_KEY in value.metadata_props
        value.const_value = ir.tensor(np.full(32, 1e9, np.float32), name=value.name)
        (run,) = support.apply(module, text).runs
        assert run.stats.fired["weight"] == (expected < 1e9)
        assert value.const_value.numpy()[0] == np.float32(expected)
        assert (CHANGED_KEY in value.metadata_props) == (expected < 1e9)  # the checkpoint has other numbers


def test_legalization_refuses_what_the_opset_has_not() -> None:
    module = support.canonical("mistral")
    support.apply(module, "last-logits,kv-retention{layout=tensor-scatter},attention")
    with pytest.raises(PassError, match=r"operator TensorScatter from model\.layers\.0\S* does not exist in opset 18"):
        support.apply(module, "legalize")


def test_retention_needs_specializations() -> None:
    module = support.lowered("llama")
    with pytest.raises(PassError, match="set the module's specializations before it"):
        support.apply(module, "canonicalize,kv-retention")


def test_a_cache_that_is_no_state_is_an_error() -> None:
    module = support.canonical("llama")
    node = next(n for n in module.graph if n.op_type == "CacheUpdate")
    b = Rewriter(module, "fault").at(node)
    past = node.inputs[0]
    assert past is not None
    node.replace_input_with(0, b("Neg", past, shape=past.shape, dtype=past.dtype))
    with pytest.raises(PassError, match=r"1 of 5 sites were not rewritten:\n.* \[refused\] it does not read a state"):
        support.apply(module, "kv-retention")


def test_logits_that_are_no_product_are_an_error() -> None:
    module = support.canonical("llama")
    _replace_logits(module, "Softmax")
    with pytest.raises(PassError, match="the logits are not a matrix product"):
        support.apply(module, "last-logits")


def _replace_logits(module: Module, op_type: str) -> None:
    old = module.output("logits")
    node = ir.node(op_type, [old])
    module.graph.append(node)
    new = node.outputs[0]
    assert old.dtype is not None
    new.shape, new.dtype = old.shape, old.dtype
    old.name, new.name = "inner", "logits"
    module.graph.outputs[0] = new


def assert_answers(decoder: Decoder, name: str, module: Module) -> None:
    """A decoder answers both prompts as transformers does."""
    limit = numerics.bound(numerics.depth(module))
    for tokens, logits in zip(support.PROMPTS, decoder.prefill(support.PROMPTS), strict=True):
        assert numerics.error_over_rms(logits, support.forward(name, tokens)) <= limit


def test_a_windowed_mask_over_other_positions_gets_no_ring(tmp_path: Path) -> None:
    """A mask that does not follow the cache's own positions would be wrong in a ring."""
    module = support.canonical("mistral")
    for node in [n for n in module.graph if n.op_type == "CachePositions"]:
        b = Rewriter(module, "fault").at(node)
        length = b("Squeeze", b("Shape", node.inputs[0], start=2, end=3))
        row = b("Unsqueeze", b("Range", b.const(0), length, b.const(1)), b.const([0]))
        zero = b("Mul", b("ReduceMax", module.input("position_ids"), b.const([1]), keepdims=1), b.const(0))
        Rewriter(module, "fault").replace(node, b("Add", row, zero))
    decoder = support.open_decoder(module, tmp_path)
    assert not any(s.ring for s in module.states)
    assert_answers(decoder, "mistral", module)


def test_a_windowed_mask_over_the_slots_of_another_cache_too_gets_no_ring(tmp_path: Path) -> None:
    """The slots of a ring are others than those of a cache of the whole context, and fewer."""
    module = support.canonical("gemma2")
    windowed = {module.output(s.output) for s in module.states if s.window is not None}
    attentions = [node for node in module.graph if node.op_type == "Attention"]
    ours = [node for node in attentions if node.inputs[1] in windowed]
    (mask,) = {node.inputs[3] for node in ours}
    (whole,) = {node.inputs[3] for node in attentions if node not in ours}
    both = Rewriter(module, "fault").at(attentions[0])("And", mask, whole)  # a window is a part of the whole
    for node in ours:
        node.replace_input_with(3, both)
    decoder = support.open_decoder(module, tmp_path)
    assert not any(s.ring for s in module.states)
    assert_answers(decoder, "gemma2", module)


def test_every_reader_of_a_cache_on_the_device_reads_what_is_gathered() -> None:
    """Layers that share a cache too: what lies in empty slots is not theirs to see."""
    module = prepare(build(RICH[1]).module, LONG)
    support.apply(module, find_backend("ai100").pipeline)
    written = [n.outputs[0] for n in module.graph if n.op_type == "CtxScatter"]
    readers = [node.op_type for value in written for node in value.consumers()]
    assert len(readers) == len(written) == len([s for s in module.states if s.has_slots]) > 3
    assert set(readers) == {"CtxGather"}


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_every_declared_shape_is_the_true_one_once_caches_are_physical(name: str, tmp_path: Path) -> None:
    """With rings and with plain caches in one graph; a runtime plans its buffers by these shapes."""
    assert_true_shapes(support.canonical(name), tmp_path)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "qwen3-next"])
def test_every_value_has_a_type_and_a_number_of_axes(name: str, target: str) -> None:
    """Kernels of a runtime too, of which ONNX infers nothing."""
    module = support.canonical(name)
    support.apply(module, support.rest_of(target))
    assert [v.name for node in module.graph for v in node.outputs if v.shape is None or v.dtype is None] == []


def test_every_declared_shape_is_the_true_one_with_rings_of_two_lengths(tmp_path: Path) -> None:
    module = prepare(build(RICH[0]).module, LONG)
    support.apply(module, "canonicalize")
    assert_true_shapes(module, tmp_path, vocab=RICH[0].vocab)
    assert len({s.ctx_dim for s in module.states}) == 3


def assert_true_shapes(module: Module, folder: Path, vocab: int = VOCAB) -> None:
    """Lower the caches, then compare each declared shape with what a run gives."""
    support.apply(module, "kv-retention{layout=tensor-scatter}")
    sizes = dict(module.specializations[0].symbols)
    feeds = support.random_feeds(module, sizes)
    feeds["input_ids"] %= vocab
    declared = support.assert_true_shapes(module, folder, feeds, sizes)
    rings = {size for name, size in sizes.items() if name.startswith("sliding_window")}
    assert sum({*rings, sizes["cache_len"]} & set(s) != set() for s in declared) > 5


def test_a_saved_and_loaded_module_is_fused_alike(tmp_path: Path) -> None:
    """What counts as a constant does not depend on how a tensor is stored."""
    module = support.canonical("llama")
    loaded = load_module(save_module(module, tmp_path))
    text = "fuse-norms,fuse-rotary,fuse-activations"
    assert [r.stats.fired for r in support.apply(loaded, text).runs] == [
        r.stats.fired for r in support.apply(module, text).runs
    ]
    assert to_text(loaded) == to_text(module)
    assert sum(n.op_type == "RotaryEmbedding" for n in loaded.graph) == 4
