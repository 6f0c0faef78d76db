"""The static cost of a run is what the formulas of a decoder say, and a roofline is its larger side."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qeff_ir.cost import Cost, Storage, cost
from qeff_ir.errors import CompileError, VerificationError
from qeff_ir.ir.module import WEIGHT_KEY, Module, Specialization
from qeff_ir.ir.residents import Resident
from qeff_ir.roofline import Device, read_device, roofline, seconds
from tests.models import MODELS, VOCAB
from tests.support import apply, canonical, rest_of

DEVICES = sorted((Path(__file__).parents[1] / "backends" / "ai100" / "devices").glob("*.json"))
CONFIG = MODELS["llama"].config
HIDDEN, LAYERS, HEADS = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["num_attention_heads"]
WIDTH, KV = CONFIG["head_dim"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
PER_LAYER = 2 * HIDDEN * HEADS * WIDTH + 2 * HIDDEN * KV + 3 * HIDDEN * CONFIG["intermediate_size"]
DEVICE = Device("test", 1.0, 100.0, 2.0, {})


def lowered(target: str) -> Module:
    module = canonical("llama")
    apply(module, rest_of(target))
    return module


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_run_costs_what_the_formulas_say(target: str) -> None:
    module = lowered(target)
    for specialization in module.specializations:
        symbols = specialization.symbols
        found = cost(module, specialization)
        batch, seq = symbols["batch_size"], symbols["seq_len"]
        slots = [symbols[d] if isinstance(d, str) else d for d in module.states[0].shape][2]
        attention = LAYERS * batch * HEADS * seq * slots * 2 * WIDTH
        assert found.multiply_adds == batch * seq * LAYERS * PER_LAYER + attention + batch * HIDDEN * VOCAB
        norms = (2 * LAYERS + 1) * HIDDEN
        weights = LAYERS * PER_LAYER + norms + HIDDEN * VOCAB
        assert found.weight_bytes == 4 * (weights + batch * seq * HIDDEN)  # and a row of the embedding for each token
        assert found.state_bytes == 4 * 2 * LAYERS * batch * KV * slots
        assert found.written_bytes == 4 * 2 * LAYERS * batch * KV * seq
        assert found.resident_bytes == found.state_bytes + 4 * (weights + HIDDEN * VOCAB)
        assert sum(op.multiply_adds for op in found.ops.values()) == found.multiply_adds
        assert sum(op.nodes for op in found.ops.values()) == len(module.graph)


def test_values_of_another_width_are_counted_as_wide_as_they_are() -> None:
    config, module = MODELS["deepseek-v3"].config, canonical("deepseek-v3")
    apply(module, rest_of("onnxruntime"))
    widths = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    for item in module.specializations:
        batch, seq, slots = (item.symbols[name] for name in ("batch_size", "seq_len", "cache_len"))
        attention = cost(module, item).ops["Attention"]
        assert attention.nodes == layers
        assert attention.multiply_adds == layers * batch * heads * seq * slots * widths


PRODUCTS = """
<ir_version: 11, opset_import: ["" : 24]>
products (
    float[batch_size, 6, seq_len] x, float[12, 3, 4] filters, float[5, batch_size] a, float[5, 7] b,
    float[batch_size, 4, seq_len, 8] q, float[batch_size, 2, 9, 8] k, float[batch_size, 2, 9, 3] v,
    float[batch_size, 2, seq_len, 9] m
) => (float[batch_size, 12, seq_len] c, float[batch_size, 7] g, float[batch_size, 4, seq_len, 3] o,
      float[batch_size, 2, seq_len, 8] p, float[batch_size, 6, seq_len] r) {
    c = Conv <group = 2, pads = [3, 0]> (x, filters)
    g = Gemm <transA = 1> (a, b)
    o = Attention (q, k, v)
    p = MatMul (m, k)
    r = Relu (x)
}
"""


def test_every_product_is_counted_by_what_it_sums_over() -> None:
    module = Module(ir.from_proto(onnx.parser.parse_model(PRODUCTS)), "Products")
    found = cost(module, Specialization("Run", "forward", {"batch_size": 3, "seq_len": 5}))
    assert {name: op.multiply_adds for name, op in found.ops.items()} == {
        "Conv": 3 * 12 * 5 * (3 * 4),  # of each group's own channels
        "Gemm": 3 * 7 * 5,
        "Attention": 3 * 4 * 5 * 9 * (8 + 3),
        "MatMul": 3 * 2 * 5 * 8 * 9,
        "Relu": 0,
    }
    assert (found.tokens, found.weight_bytes, found.state_bytes, found.resident_bytes) == (15, 0, 0, 0)


SHARED = """
<ir_version: 11, opset_import: ["" : 24]>
shared (float[seq_len, 6] x, int64[seq_len] ids, float[6, 6] w) => (float[seq_len, 6] c, float[seq_len, 6] r) {
    a = MatMul (x, w)
    b = Add (a, x)
    c = MatMul (b, w)
    r = Gather (w, ids)
}
"""


def test_a_weight_is_read_once_a_run_and_its_rows_as_often_as_they_are_looked_up() -> None:
    module = Module(ir.from_proto(onnx.parser.parse_model(SHARED)), "Shared")
    weight = module.input("w")
    weight.metadata_props[WEIGHT_KEY] = "w"
    found = cost(module, Specialization("Run", "forward", {"batch_size": 1, "seq_len": 5}))
    assert found.weight_bytes == 4 * (6 * 6 + 5 * 6)
    assert {n: op.weight_bytes for n, op in found.ops.items()} == {"MatMul": 144, "Add": 0, "Gather": 120}
    assert found.resident_bytes == 144


CHOICE = """
<ir_version: 11, opset_import: ["" : 24]>
choice (float[4, 8] pixel_values, float[batch_size, seq_len, 8] x, float[8, 8] tower, float[8, 8] head)
    => (float[batch_size, seq_len, 8] y, float[4, 8] pixel_values_RetainedState) {
    one = Constant <value = int64[1] {1}> ()
    length = Shape <start = 1, end = 2> (x)
    alone = Equal (length, one)
    encoded = MatMul (pixel_values, tower)
    zero = Constant <value = int64[1] {0}> ()
    row = ReduceMax <keepdims = 1> (encoded, zero)
    merged = Add (x, row)
    chosen = Where (alone, x, merged)
    y = MatMul (chosen, head)
    pixel_values_RetainedState = Identity (pixel_values)
}
"""


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_the_sizes_of_a_run_leave_out_costs_nothing(tokens: int, fixed: bool) -> None:
    """By a compiler of fixed sizes; and the pixels that the host wrote are handed on, and not written."""
    module = Module(ir.from_proto(onnx.parser.parse_model(CHOICE)), "Choice")
    for name in ("tower", "head"):
        module.input(name).metadata_props[WEIGHT_KEY] = name
    module.residents.append(Resident(0, "pixels", (4, 8), ir.DataType.FLOAT))
    item = Specialization("Run", "decode", {"batch_size": 2, "seq_len": tokens})
    found, encodes = cost(module, item, fixed=fixed), tokens > 1 or not fixed
    assert found.multiply_adds == (4 * 64 if encodes else 0) + 2 * tokens * 64
    assert found.weight_bytes == 4 * (128 if encodes else 64)
    assert found.ops["MatMul"].nodes == (2 if encodes else 1)
    assert (found.state_bytes, found.written_bytes) == (128 if encodes else 0, 0)
    assert found.resident_bytes == 4 * 128 + 128


def test_a_target_that_stores_less_reads_less() -> None:
    module = lowered("ai100")
    whole = cost(module, module.specializations[-1])
    half = cost(module, module.specializations[-1], Storage(2, 2, 1))
    assert (half.weight_bytes, half.state_bytes) == (whole.weight_bytes / 2, whole.state_bytes / 4)
    packed = cost(module, module.specializations[-1], Storage(2, 25 / 32, 2))
    saved = (2 - 25 / 32) * (LAYERS * PER_LAYER + HIDDEN * VOCAB)
    assert math.isclose(half.weight_bytes - packed.weight_bytes, saved)


def test_a_roofline_is_the_larger_of_its_sides() -> None:
    step = Cost("Decode", 2, 40e6, 50e6, 10e6, 10**6, 95e6)
    chunk = Cost("Prefill", 16, 40e6, 50e6, 10e6, 8 * 10**9, 95e6)
    assert seconds(step, DEVICE) == pytest.approx(1e-3)  # 100 MB at 100 GB/s
    assert seconds(chunk, DEVICE) == pytest.approx(4e-3)  # 8 G multiply-adds at 2 T/s
    found = roofline(chunk, step, DEVICE, prompt=20, batch=2)
    assert found.first_token_s == pytest.approx(3 * 4e-3)  # chunks of 8 tokens of each row
    assert found.tokens_per_s == pytest.approx(2 / 1e-3)
    assert found.fits is True
    assert roofline(chunk, replace(step, resident_bytes=1.1e9), DEVICE, 20, 2).fits is False
    assert roofline(chunk, replace(step, resident_bytes=1.1e9), DEVICE, 20, 2, devices=2).fits is True


def test_a_figure_that_is_not_known_gives_no_answer() -> None:
    step = Cost("Decode", 1, 1e6, 0, 0, 10, 1e6)
    found = roofline(step, step, replace(DEVICE, bandwidth_gb_s=None, memory_gb=None), 1, 1)
    assert (found.fits, found.first_token_s, found.tokens_per_s) == (None, None, None)


def test_shipped_devices_have_a_source_for_every_figure() -> None:
    assert [path.stem for path in DEVICES] == ["pro", "standard", "ultra"]
    for path in DEVICES:
        device = read_device(path)
        figures = {n: getattr(device, n) for n in ("memory_gb", "bandwidth_gb_s", "tera_multiply_adds")}
        assert set(device.sources) == set(figures) and all(figures.values())


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"memory_gb": -1}', None])
def test_what_describes_no_device_is_told(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    whole = {"name": "x", "memory_gb": 1, "bandwidth_gb_s": None, "tera_multiply_adds": None, "sources": {}}
    file.write_text(json.dumps(whole))
    assert read_device(file).memory_gb == 1
    if text is None:
        file.unlink()
    else:
        file.write_text(json.dumps({**whole, "memory_gb": -1}) if "-1" in text else text)
    with pytest.raises(CompileError, match="is no description of a device"):
        read_device(file)


@pytest.mark.parametrize("missing", ["batch_size", "seq_len", "ctx_len"])
def test_a_symbol_without_a_size_is_told(missing: str) -> None:
    sizes = {"batch_size": 1, "seq_len": 4, "ctx_len": 16}
    del sizes[missing]
    with pytest.raises(VerificationError, match=f"^.cost. .*({missing}|is not known)"):
        cost(canonical("llama"), Specialization("Decode", "decode", sizes))
