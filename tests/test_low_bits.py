"""Packages with weights of few bits answer as those with the same numbers in float32, on both targets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from backends.ai100 import contract
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from backends.onnxruntime.backend import BACKEND as BACKEND_ORT
from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForImageTextToText
from qeff_ir.cost import cost
from qeff_ir.debug.drift import fast_parts
from qeff_ir.errors import CompileError, PassError, PipelineError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.numerics import error_over_rms
from qeff_ir.package import MAIN, read_manifest
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.passing.properties import FAST
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized
from qeff_ir.runtime.decoder import Decoder
from tests import multimodal, processors, support
from tests.adapters.random_adapters import base, make
from tests.backends.ai100.test_contract import codes, edit_model
from tests.processors import PROCESSORS
from tests.support import OPTIONS, PROMPTS


def quantize(name: str, options: str = "block=16", *, rounded_experts: bool = False) -> tuple[Module, Module]:
    """A tiny model with weights of few bits, and one with the same numbers in float32; experts are MXFP4 by default."""
    module = support.canonical(name)
    support.apply(module, f"quantize-weights{{{options}}}")
    module.properties.remove(FAST)  # what is compared with has the same numbers
    for value in module.graph.initializers.values():
        if len(value.shape or ()) == 3 and "experts" in str(value.name) and not rounded_experts:
            value.const_value = mxfp4(str(value.name), value.const_value)
    dense = module.clone()
    support.apply(dense, "dequantize")
    return module, dense


def mxfp4(name: str, tensor: ir.TensorProtocol | None) -> ir.LazyTensor:
    """Experts ``[experts, out, in]`` in blocks of 32 numbers of four bits, each with a power of two."""
    assert tensor is not None
    array = tensor.numpy()
    blocks = array.reshape(*array.shape[:2], -1, 32)
    scales = np.exp2(np.ceil(np.log2(np.abs(blocks).max(-1) / 6)))
    numbers = (blocks / scales[..., None]).reshape(array.shape).astype(ir.DataType.FLOAT4E2M1.numpy())
    parts = [
        lazy(name, ir.DataType.FLOAT4E2M1, array.shape, lambda: numbers),
        lazy(name, ir.DataType.FLOAT8E8M0, scales.shape, lambda: scales.astype(ir.DataType.FLOAT8E8M0.numpy())),
    ]
    return dequantized(name, Quantized(parts[0], parts[1], None, 2, 32))


def fired(report: Any) -> Counter[str]:
    return sum((run.stats.fired for run in report.runs if run.id in ("ort-matmul-nbits", "nbits")), Counter[str]())


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize(
    ("name", "options", "ort", "ai100"),
    [  # products, look-ups; a head that is the table too is float32 on the AI 100, and so are experts and 8 bits
        ("llama", "block=16", (9, 0), (15, 0)),
        ("gpt2", "block=16", (9, 1), (8, 0)),
        ("gpt2", "bits=8 block=16", (0, 0), (0, 0)),
        ("mixtral", "block=16", (5, 4), (9, 0)),
    ],
)
def test_it_answers_as_the_same_numbers_in_float32(
    name: str, options: str, ort: tuple[int, int], ai100: tuple[int, int], target: str, tmp_path: Path
) -> None:
    module, dense = quantize(name, options)
    found = fired(run_pipeline(module, Pipeline.parse(support.rest_of(target)), check=2))
    wanted = ort if target == "onnxruntime" else ai100
    assert (found["MatMulNBits"], found["GatherBlockQuantized"]) == wanted
    left = [v for v in module.graph.initializers.values() if quantized(v.const_value) is not None]
    assert bool(left) == (target == "onnxruntime" and "bits=8" in options)  # which its runtime makes float32
    support.answers_alike(module, dense, target, tmp_path)
    own, whole = (sum(p.stat().st_size for p in (tmp_path / n / "weights").iterdir()) for n in ("own", "plain"))
    assert target == "ai100" or own < 0.6 * whole


def test_experts_are_rounded_as_other_weights_are(tmp_path: Path) -> None:
    weights = {n: v.const_value for n, v in support.canonical("mixtral").graph.initializers.items()}
    whole = {n: tensor for n, tensor in weights.items() if ".experts." in n and tensor is not None}
    module, dense = quantize("mixtral", "bits=8 block=16", rounded_experts=True)
    assert len(whole) == 4
    for name, tensor in whole.items():
        parts, before = quantized(module.graph.initializers[name].const_value), tensor.numpy()
        assert parts is not None and parts.axis == 2 and parts.codes.dtype == ir.DataType.UINT8
        assert error_over_rms(parts.numbers(), before) < 0.02
    found = fired(run_pipeline(module, Pipeline.parse(support.rest_of("onnxruntime")), check=2))
    assert found == {"GatherBlockQuantized": 4}  # products with codes of 8 bits are for level 4
    support.answers_alike(module, dense, "onnxruntime", tmp_path)
    kept = support.canonical("mixtral")
    support.apply(kept, 'quantize-weights{skip="*.experts.*"}')
    assert not any(quantized(kept.graph.initializers[name].const_value) for name in whole)


def test_a_module_that_rounds_activations_says_so_and_answers_nearly_as_well(tmp_path: Path) -> None:
    module, dense = quantize("llama", "bits=8 block=32")
    text = support.rest_of("onnxruntime").replace("nbits", "nbits{level=4}")
    report = run_pipeline(module, Pipeline.parse(text), check=2)
    assert fired(report)["MatMulNBits"] == 9 and FAST in module.properties
    exact = support.open_decoder(dense, tmp_path / "exact")
    assert FAST not in dense.properties
    BACKEND_ORT.emit(module, tmp_path / "fast", OPTIONS)
    assert FAST in load_module(tmp_path / "fast" / "model.onnx").properties
    fast = Decoder(BACKEND_ORT.open(tmp_path / "fast", threads=1))
    error = error_over_rms(fast.prefill(PROMPTS), exact.prefill(PROMPTS))
    assert 1e-5 < error < 0.2  # near, and not within the usual bound
    plain, _ = quantize("llama", "bits=8 block=32")
    runs = run_pipeline(plain, Pipeline.parse(support.rest_of("onnxruntime"))).runs
    (missed,) = (run.stats.missed for run in runs if run.id == "ort-matmul-nbits")
    assert len(missed) == 9 and "is fast with level=4 only" in missed[0].reason


def test_a_level_of_products_is_an_option_of_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    shapes: dict[str, Any] = {"target": "onnxruntime", "batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48}
    folder = model.compile(**shapes, pipeline="+quantize-weights{bits=8 block=32}", matmul_level=4)
    manifest = read_manifest(Path(folder))
    assert manifest.options["matmul_level"] == 4
    assert fast_parts(manifest) == ["the pass quantize-weights", "the pass ort-matmul-nbits"]
    graph = load_module(Path(folder) / "model.onnx").graph
    levels = [n.attributes.get_int("accuracy_level", 0) for n in graph if n.op_type == "MatMulNBits"]
    assert levels == [4] * 9
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"matmul_level": 4}, CompileError, "matmul_level=4 is for products .* of few bits, of which .* none"),
        ({"matmul_level": 3}, CompileError, "matmul_level=3 is no level of the products: give 0 .* or 4"),
        ({"matmul_level": 4, "pipeline": "-ort-matmul-nbits"}, PipelineError, "there is no 'ort-matmul-nbits'"),
    ]
    for given, error, message in refused:
        with pytest.raises(error, match=message):
            model.compile(**shapes, **given)
    with pytest.raises(CompileError, match=r"matmul_level=4 is for products .* of which .* none"):
        QEFFAutoModel(support.tiny("llama")[1], pooling="mean").compile(seq_len=8, target="onnxruntime", matmul_level=4)


def test_an_encoder_beside_a_decoder_of_few_bits_may_have_none(tmp_path: Path) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively("llava"), processors.processor("llava"))
    model.compile(
        target="onnxruntime", ctx_len=96, prefill_seq_len=8, image_size=PROCESSORS["llava"].size, compile_dir=tmp_path,
        pipeline={MAIN: "+quantize-weights{block=16}"}, matmul_level=4,
    )  # fmt: skip
    programs = [load_module(f).graph for f in (tmp_path / "model.onnx", tmp_path / "vision" / "model.onnx")]
    assert [any(n.op_type == "MatMulNBits" for n in graph) for graph in programs] == [True, False]


def test_each_kind_of_weight_has_bits_of_its_own() -> None:
    def bits(name: str, options: str) -> dict[str, int]:
        module = support.canonical(name)
        support.apply(module, f"quantize-weights{{{options}}}")
        found = {n: quantized(v.const_value) for n, v in module.graph.initializers.items()}
        return {n: parts.codes.dtype.bitwidth or 0 for n, parts in found.items() if parts is not None}

    plain = bits("llama", "block=16")
    assert len(plain) == 15 and set(plain.values()) == {4} and "lm_head.weight" in plain
    own = bits("llama", 'block=16 head=8 table=8 skip="*.o_proj.weight"')
    assert own["lm_head.weight"] == own["model.embed_tokens.weight"] == 8
    assert set(plain) - set(own) == {f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)}
    assert "lm_head.weight" not in bits("llama", "bits=8 head=0")
    assert bits("gpt2", "block=16 table=8")["transformer.wpe.weight"] == 8
    with pytest.raises(PassError, match="blocks of 24 are none that kernels take"):
        bits("llama", "block=24")
    with pytest.raises(PassError, match=r"skip names 'layers\.7', which is no weight of the model"):
        bits("llama", 'skip="layers.7"')


def test_the_text_and_the_cost_tell_of_codes() -> None:
    module, dense = quantize("llama")
    line = next(x for x in to_text(module).splitlines() if "gate_proj.weight:" in x)
    assert "of uint4, a scale for 16 along axis 1 with zeros" in line
    small, large = (cost(m, m.specializations[-1]) for m in (module, dense))
    parts = [p for v in module.graph.initializers.values() if (p := quantized(v.const_value)) is not None]
    saved = sum(4 * p.codes.size - p.nbytes for p in parts)
    assert large.resident_bytes - small.resident_bytes == pytest.approx(saved)
    assert large.weight_bytes - small.weight_bytes == pytest.approx(saved)
    for one in (module, dense):
        support.apply(one, support.rest_of("onnxruntime"))
    small, large = (cost(m, m.specializations[-1]) for m in (module, dense))
    assert large.resident_bytes - small.resident_bytes == pytest.approx(saved)
    assert large.weight_bytes - small.weight_bytes == pytest.approx(saved)
    assert large.multiply_adds == small.multiply_adds


def test_rows_of_a_table_of_codes_are_counted_as_they_are_read() -> None:
    module, _ = quantize("gpt2")
    support.apply(module, support.rest_of("onnxruntime"))
    (rows,) = [op for name, op in cost(module, module.specializations[-1]).ops.items() if "GatherBlock" in name]
    width, tokens = 32, OPTIONS.batch_size
    assert rows.weight_bytes == tokens * (
        width // 2 + width // 16
    )  # codes, and a byte of zero a block; scales are unsqueezed first


def test_products_that_are_joined_keep_their_codes(tmp_path: Path) -> None:
    module, dense = quantize("llama")
    run_pipeline(module, Pipeline.parse(support.rest_of("onnxruntime")))
    products = [n for n in module.graph if n.op_type == "MatMulNBits"]
    assert len(products) == 9 and not [n for n in module.graph if n.op_type == "FusedMatMul"]
    own = support.open_decoder(module, tmp_path / "own", "unflatten")
    expected = support.open_decoder(dense, tmp_path / "dense")
    np.testing.assert_allclose(own.prefill(PROMPTS), expected.prefill(PROMPTS), atol=1e-5)


@pytest.mark.parametrize("form", [{"flags": {"sub_functions": True}}, {"weight_free": True}])
def test_other_forms_of_an_ai100_package_have_the_codes_too(form: dict[str, Any], tmp_path: Path) -> None:
    options = Ai100Options(prefill_seq_len=8, ctx_len=48, batch_size=2, **form)
    module, dense = quantize("llama")
    support.apply(module, support.rest_of("ai100"))
    expected = support.open_decoder(dense, tmp_path / "dense")
    BACKEND.emit(module, tmp_path / "own", options)
    own = Decoder(BACKEND.open(tmp_path / "own", threads=1))
    np.testing.assert_allclose(own.prefill(PROMPTS), expected.prefill(PROMPTS), atol=1e-5)


def test_a_damaged_product_of_codes_is_found(tmp_path: Path) -> None:
    module, _ = quantize("llama")
    support.apply(module, support.rest_of("ai100"))
    BACKEND.emit(module, tmp_path, Ai100Options(prefill_seq_len=8, ctx_len=48, batch_size=2))
    assert list(contract.violations(tmp_path)) == []

    def damage(change: Any) -> set[str]:
        (path,) = tmp_path.glob("*.onnx")
        before = path.read_bytes()
        edit_model(tmp_path, lambda m: change(next(n for n in m.graph.node if n.op_type == "MatMulNBits")))
        found = codes(tmp_path)
        path.write_bytes(before)
        return found

    def set_to(name: str, number: int) -> Any:
        return lambda n: setattr(next(a for a in n.attribute if a.name == name), "i", number)

    changes = [set_to("bits", 8), set_to("block_size", 32), set_to("K", 33), set_to("N", 5), lambda n: n.input.pop()]
    changes += [lambda n: n.input.__setitem__(2, n.input[3]), lambda n: n.input.append("")]
    assert [damage(change) for change in changes] == [{"nbits"}] * len(changes)


def test_an_adapter_that_is_merged_into_codes_makes_them_float32(tmp_path: Path) -> None:
    make(base("llama"), tmp_path, 0, r=4, target_modules=["up_proj"])
    module, dense = quantize("llama")
    report = support.apply(module, f'merge-lora{{adapter="{tmp_path}"}}')
    support.apply(dense, f'merge-lora{{adapter="{tmp_path}"}}')
    name = "model.layers.0.mlp.up_proj.weight"
    own, plain = (m.graph.initializers[name].const_value for m in (module, dense))
    assert own is not None and plain is not None and quantized(own) is None
    assert np.array_equal(own.numpy(), plain.numpy())
    assert [m.reason for m in report.runs[0].stats.missed] == ["its weight was of few bits, and is float32 now"] * 2


def test_saved_codes_are_read_again(tmp_path: Path) -> None:
    module, _ = quantize("mixtral")
    back = load_module(save_module(module, tmp_path))
    for name, value in module.graph.initializers.items():
        if WEIGHT_KEY not in value.metadata_props:
            continue
        found = back.graph.initializers[name].const_value
        assert value.const_value is not None and found is not None
        assert (quantized(found) is None) == (quantized(value.const_value) is None)
        assert np.array_equal(found.numpy(), value.const_value.numpy())
