"""Attention in blocks of heads, queries and keys: windows, rings, sinks, soft-caps and biases, on both targets."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from backends import find_backend
from passes import _online_softmax, blocked_attention
from passes._blocks import Extent, bounds, fitting
from passes.blocked_attention import BlockedAttention
from qeff_ir.arrays import Array
from qeff_ir.compiler import compile_model
from qeff_ir.errors import PassError
from qeff_ir.ir.module import SOURCE_KEY, Module
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.manager import PassRun
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support

KEYS = "blocked-attention{mode=kv num-kv-blocks=7}"
ALL = "blocked-attention{num-kv-blocks=3 num-q-blocks=1 head-block-size=2}"


def blocked(target: str, text: str) -> Pipeline:
    return Pipeline.parse(find_backend(target).pipeline).insert_before("attention", text)


def fired(name: str, target: str, text: str) -> tuple[Module, PassRun]:
    module = support.canonical(name)
    report = run_pipeline(module, blocked(target, text), check=2)
    return module, next(run for run in report.runs if run.id == "blocked-attention")


def layers(module: Module) -> int:
    return sum(node.op_type in ("Attention", "SinkAttention") for node in module.graph)


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "ai100") for name in ("llama", "mistral", "gemma2", "gpt-oss", "bloom", "deepseek-v3")]
    + [("mistral", "onnxruntime"), ("gpt-oss", "onnxruntime")],
)
def test_it_answers_as_before(name: str, target: str, tmp_path: Path) -> None:
    plain = support.canonical(name)
    text = KEYS if name == "mistral" else ALL
    module, run = fired(name, target, text)
    assert sum(run.stats.fired.values()) == layers(plain) and not run.stats.missed
    support.answers_alike(module, plain, target, tmp_path)


@functools.cache
def prefilled(target: str, text: str) -> Array:
    """What a package that only has prefill answers."""
    module, backend = support.lowered("gpt-oss"), find_backend(target)
    specialize(module, support.OPTIONS)
    module.specializations = [s for s in module.specializations if s.phase == "prefill"]
    run_pipeline(module, blocked(target, text), check=1)
    backend.check(module, support.OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        backend.emit(module, Path(folder), support.OPTIONS)
        return Decoder(backend.open(Path(folder), threads=1)).prefill(support.PROMPTS)


@pytest.mark.parametrize(
    ("target", "mode", "numbers"),
    [
        ("onnxruntime", "kv", "num-kv-blocks=3"),
        ("onnxruntime", "h", "head-block-size=2"),
        ("onnxruntime", "hkv", "head-block-size=1 num-kv-blocks=2"),  # a group is never cut
        ("onnxruntime", "q", "num-q-blocks=3"),
        ("onnxruntime", "qkv", "num-q-blocks=2 num-kv-blocks=2"),
        ("onnxruntime", "hq", "num-q-blocks=2 head-block-size=2"),
        ("onnxruntime", "hqkv", "num-q-blocks=2 head-block-size=2 num-kv-blocks=4"),
        ("ai100", "hq", "num-q-blocks=2 head-block-size=2"),
        ("ai100", "hqkv", "num-q-blocks=2 head-block-size=2 num-kv-blocks=4"),
    ],
)
def test_every_mode_answers_as_before_where_there_is_only_prefill(target: str, mode: str, numbers: str) -> None:
    found = prefilled(target, f"blocked-attention{{mode={mode} {numbers}}}")
    np.testing.assert_allclose(found, prefilled(target, ""), atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "counts"),
    [
        ("mode=kv num-kv-blocks=3", "1 x 1 x 3"),
        ("mode=hkv head-block-size=1 num-kv-blocks=2", "2 x 1 x 2"),
        ("num-q-blocks=3 head-block-size=3", "2 x 3 x 1"),
    ],
)
def test_numbers_are_those_that_are_given(numbers: str, counts: str) -> None:
    module = support.canonical("llama")
    module.specializations = [s for s in module.specializations if s.phase == "prefill"]
    steps = f"kv-retention{{layout=tensor-scatter}},blocked-attention{{{numbers}}}"
    assert dict(support.apply(module, steps).runs[-1].stats.fired) == {f"{counts} blocks": 2}


def test_the_device_reads_blocks_of_its_caches(tmp_path: Path) -> None:
    """Each slot once: no read of a whole cache is left, and all blocks of heads take the same reads."""
    edits, out = f"+{ALL}<attention", tmp_path / "package"
    options = {"prefill_seq_len": 8, "ctx_len": 48}
    made = compile_model(support.Lowered("llama"), options, target="ai100", pipeline=edits, out=out, emit_only=True)
    (file,) = made.folder.glob("*.onnx")
    model = onnx.load(str(file), load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node if node.domain == "com.qualcomm.cloud")
    assert kinds == {"CtxScatter": 4, "CtxGatherBlockedKV": 3 * 4}


def test_every_check_passes() -> None:
    module = support.canonical("gpt-oss")
    run_pipeline(module, blocked("ai100", KEYS), check=4)
    exponents = Counter(node.metadata_props[SOURCE_KEY] for node in module.graph if node.op_type == "Exp")
    assert set(exponents.values()) == {7 + 6 + 2}  # weights of the blocks, what fades before all but the first, sinks


def test_what_fits_one_block_is_left_to_the_stock_pass() -> None:
    _, run = fired("llama", "ai100", "blocked-attention")
    assert not run.stats.fired and {m.reason for m in run.stats.missed} == {"all of it is in one block"}


def test_queries_stay_whole_where_a_package_decodes() -> None:
    module, run = fired("llama", "ai100", "blocked-attention{num-q-blocks=2 num-kv-blocks=2}")
    assert dict(run.stats.fired) == {"1 x 1 x 2 blocks": 2}
    assert {m.reason for m in run.stats.missed} == {"a specialization has 1 queries, less than num_q_blocks=2"}
    assert layers(module) == 0


@pytest.mark.parametrize("text", ["mode=kv num-q-blocks=2", "mode=q head-block-size=2", "num-kv-blocks=-1"])
def test_numbers_that_the_mode_does_not_name_are_refused(text: str) -> None:
    with pytest.raises(PassError, match="does not fit mode="):
        fired("llama", "ai100", f"blocked-attention{{{text}}}")


def test_it_stands_before_attention_is_lowered() -> None:
    module = support.canonical("llama")
    with pytest.raises(PassError, match=r"write \+blocked-attention<attention"):
        run_pipeline(module, Pipeline.parse(find_backend("ai100").pipeline).add("blocked-attention"))


WIDE = Extent(1, 8, 4, frozenset({128}), frozenset({8192}), 256)
BOTH = Extent(1, 2, 4, frozenset({1, 128}), frozenset({64, 8192}), 256)


@pytest.mark.parametrize(
    ("extent", "given", "budget", "counts"),
    [
        (WIDE, (None, None, None), 2**40, (1, 1, 1)),
        (WIDE, (None, None, None), 6 * 2**20, (8, 4, 1)),
        (WIDE, (1, 1, None), 6 * 2**20, (1, 1, 16)),
        (WIDE, (None, 1, 2), 6 * 2**20, (8, 1, 2)),
        (BOTH, (None, None, None), 6 * 2**20, (2, 1, 2)),
        (BOTH, (1, 7, 100), 6 * 2**20, (1, 1, 64)),  # no more than the shortest specialization has
    ],
)
def test_the_least_numbers_of_blocks_that_fit(
    extent: Extent, given: tuple[int | None, ...], budget: int, counts: tuple[int, int, int]
) -> None:
    assert fitting(extent, given, budget) == counts
    assert None not in given or extent.block_bytes(*counts) <= budget


@pytest.mark.parametrize(("length", "count"), [(48, 7), (8, 8), (9, 5), (5, 1)])
def test_no_block_is_empty(length: int, count: int) -> None:
    sizes = [end - start for start, end in itertools.pairwise(bounds(length, count))]
    assert sum(sizes) == length and min(sizes) > 0 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_it_holds_on_drawn_decoders(target: str) -> None:
    item = BlockedAttention(num_kv_blocks=3, head_block_size=1)
    steps = blocked(target, "blocked-attention")
    held = hold_pass(item, target=target, pipeline=steps, examples=12)
    assert sum(held.fired.values()) > 0
    assert hold_package(item, target=target, pipeline=steps, examples=5).changed > 0


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        (_online_softmax.attend, 'b("Exp", b("Sub", scores, new))', 'b("Exp", b("Sub", scores, highest))'),
        (_online_softmax.attend, 'b("Add", b("Mul", total, fade), sums)', 'b("Add", total, sums)'),
        (_online_softmax.attend, 'mixed = b("Mul", mixed, fade)', "mixed = mixed"),
        (blocked_attention._blocked, "group.of(q, 1, b)", "of_heads[0].of(q, 1, b)"),
    ],
    ids=["top of the block", "total not faded", "sinks not faded", "queries of other heads"],
)
def test_a_wrong_block_is_told(code: Callable[..., Any], old: str, new: str) -> None:
    item = BlockedAttention(num_kv_blocks=3, head_block_size=1)
    steps = blocked("ai100", "blocked-attention")
    with planted(code, old, new), pytest.raises((NotHeldError, PassError)):
        hold_pass(item, target="ai100", pipeline=steps, examples=30, shrink=False)


def test_a_bias_that_hides_a_whole_block_gives_numbers(tmp_path: Path) -> None:
    """A query that sees nothing of the first block of keys, by a bias of minus infinity."""
    sizes = {"q": [1, 2, 3, 4], "k": [1, 2, 6, 4], "v": [1, 2, 6, 4], "bias": [1, 1, 3, 6]}
    inputs = [ir.val(name, shape=ir.Shape(shape), dtype=ir.DataType.FLOAT) for name, shape in sizes.items()]
    node = ir.node("Attention", inputs, {"scale": 0.5})
    out = node.outputs[0]
    out.name, out.shape, out.dtype = "out", ir.Shape(sizes["q"]), ir.DataType.FLOAT
    graph = ir.Graph(inputs, [out], nodes=[node], opset_imports={"": 23}, name="one")
    module = Module(ir.Model(graph, ir_version=10), "one")
    BlockedAttention(mode="kv", num_kv_blocks=2).run(module, Rewriter(module, "test"))
    assert layers(module) == 0
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    feeds["bias"][0, 0, 1, :3] = -np.inf
    scores = 0.5 * feeds["q"] @ feeds["k"].swapaxes(2, 3) + feeds["bias"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ feeds["v"]
    np.testing.assert_allclose(support.run_graph(module, tmp_path, feeds)["out"], expected, atol=1e-5)
