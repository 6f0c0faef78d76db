"""Models compiled for 16 bits answer as transformers' own model loaded in them, and nothing stays float32 unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from backends import find_backend
from backends.ai100 import arithmetic
from backends.ai100.emulator import EmulatedSession
from qeff_ir import QEFFAutoModelForCausalLM, numerics
from qeff_ir.arrays import Array
from qeff_ir.errors import CompileError, PassError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.numerics import error_over_rms
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.storage import load_model
from qeff_ir.target_options import read_options
from qeff_ir.testing.trace import reference_trace, session_trace
from qeff_ir.widening import HALVES
from tests import models, support
from tests.models import COMMON, MODELS, VOCAB, TinyModel
from tests.support import PROMPTS
from tests.test_halves import TYPES
from tests.test_halves import checkpoint as halved

SHAPES: dict[str, Any] = {
    "target": "ai100", "emit_only": True, "batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48,
}  # fmt: skip
STEPS = 4
ROWS: dict[str, TinyModel] = {
    **{name: MODELS[name] for name in ("llama", "gpt2", "gemma2", "qwen2")},
    # Few experts: of many, two are often nearer to each other than a rounding, and which is taken is chance.
    "mixtral": TinyModel("mixtral", {**COMMON, "num_local_experts": 4}),
    "olmo2": TinyModel("olmo2", COMMON),
    "granite": TinyModel("granite", COMMON),
    "gpt_bigcode": TinyModel(
        "gpt_bigcode",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 256,
            "initializer_range": 0.05, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
}  # fmt: skip
HARDWARE = {"float16": {}, "bfloat16": {"aic_hw_version": "ai200"}}


def checkpoint(name: str, dtype: str, folder: Path) -> Path:
    """A tiny model's folder in a type, which its configuration names too."""
    config = halved(name, dtype, folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": dtype}))
    return folder


def compiled(folder: Path, dtype: Any, **options: Any) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM.from_pretrained(folder)
    model.compile(**SHAPES, dtype=dtype, **options)
    return model


def graph_of(model: QEFFAutoModelForCausalLM) -> ir.Model:
    return load_model(next(model.package.folder.glob("*.onnx")))


def depth_of(model: QEFFAutoModelForCausalLM) -> int:
    """Products in a row, counted on what was emitted: the attention is two of them there as well."""
    return numerics.depth(Module.with_facts(graph_of(model)))


def computed(graph: ir.Graph) -> dict[str, set[str]]:
    """The float types that each operator's results have."""
    found = dict[str, set[str]]()
    for node in graph:
        types = {v.dtype.name for v in node.outputs if v.dtype is not None and v.dtype.is_floating_point()}
        found.setdefault(node.op_type, set()).update(types)
    return found


@pytest.mark.parametrize("dtype", HARDWARE)
def test_weights_caches_and_activations_have_the_type(dtype: str, tmp_path: Path) -> None:
    folder = checkpoint("llama", dtype, tmp_path / "model")
    model = compiled(folder, "auto", **HARDWARE[dtype])
    graph, name = graph_of(model).graph, TYPES[dtype].name
    made = computed(graph)
    assert made["MatMul"] == made["CtxScatter"] == made["Gather"] == {name}
    assert made["CustomRMSNorm"] == made["Softmax"] == made["Cos"] == {"FLOAT"}
    weights = [v for v in graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    assert len(weights) == len(support.tiny("llama")[1].state_dict()) and {v.dtype for v in weights} == {TYPES[dtype]}
    cast = {v.name for v in weights if any(user.op_type == "Cast" for user in v.consumers())}
    assert cast == {v.name for v in weights if v.shape is not None and len(v.shape) == 1}  # the scales of norms
    states = [v for v in graph.inputs if str(v.name).startswith("past_")]
    assert states and {v.dtype for v in states} == {TYPES[dtype]} and graph.outputs[0].dtype == ir.DataType.FLOAT
    files = {path.name: path for path in (model.package.folder / "weights").iterdir()}
    assert list(files) == ["model.safetensors"]
    assert files["model.safetensors"].read_bytes() == (folder / "model.safetensors").read_bytes()


def emitted(dtype: str, folder: Path, **options: Any) -> Path:
    """The files of a tiny model that is lowered once."""
    module, backend = support.canonical("llama"), find_backend("ai100")
    support.apply(module, f"{support.rest_of('ai100')},dtype{{type={dtype}}}")
    asked = {key: value for key, value in SHAPES.items() if key not in ("target", "emit_only")}
    read = read_options(backend, {**asked, "dtype": dtype, **HARDWARE[dtype], **options})
    backend.check_options(read)
    backend.check(module, read)
    backend.emit(module, folder, read)
    return folder


def test_the_compiler_is_told_by_the_contract(tmp_path: Path) -> None:
    wanted = {"-convert-to-fp16", "-custom-IO-list-file"}
    for dtype in HARDWARE:
        package = emitted(dtype, tmp_path / dtype)
        argv = json.loads((package / "compile_command.json").read_text())["argv"]
        listed = (package / "custom_io.yaml").read_text()
        assert listed.count(f"Precision: {dtype}") == listed.count("IOName") == 8
        assert wanted & {word.partition("=")[0] for word in argv} == (wanted if dtype == "float16" else set())
    small = emitted("bfloat16", tmp_path / "small", mxint8_kv_cache=True)
    assert "-custom-IO-list-file=custom_io.yaml" in (small / "compile_command.json").read_text()


def test_forms_of_the_package_answer_alike(tmp_path: Path) -> None:
    found = list[Array]()
    for index, options in enumerate(({}, {"weight_free": True}, {"sub_functions": True})):
        folder = emitted("float16", tmp_path / str(index), **options)
        decoder = Decoder(find_backend("ai100").open(folder, threads=1))
        found.append(np.concatenate([decoder.prefill(PROMPTS), decoder.decode([5, 6])]))
    assert np.ptp(found[0]) > 0 and np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_caches_hold_numbers_of_the_type(tmp_path: Path) -> None:
    session = find_backend("ai100").open(emitted("float16", tmp_path), threads=1)
    Decoder(session).prefill(PROMPTS)
    assert isinstance(session, EmulatedSession) and session.computes == ir.DataType.FLOAT16
    for value in session._states.values():
        numbers = np.asarray(value.numpy())
        assert np.ptp(numbers) > 0 and np.array_equal(numbers, numbers.astype(np.float16).astype(np.float32))


def test_each_node_rounds_once(tmp_path: Path) -> None:
    """Against NumPy, whose halves round after each operator; ONNX Runtime left to itself gives other numbers."""
    import onnxruntime as ort

    random = np.random.default_rng(0)
    x, w = (random.standard_normal((64, 64)).astype(np.float16) for _ in range(2))
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["h"], to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("Mul", ["h", "w"], ["a"]),
        onnx.helper.make_node("Add", ["a", "w"], ["b"]),
        onnx.helper.make_node("Transpose", ["b"], ["t"]),
        onnx.helper.make_node("Mul", ["t", "a"], ["c"]),
    ]
    infos = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, 64])]
    outs = [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT16, [64, 64])]
    graph = onnx.helper.make_graph(nodes, "g", infos, outs, [onnx.numpy_helper.from_array(w, "w")])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    assert arithmetic.declared_type(proto) == ir.DataType.FLOAT16
    session = ort.InferenceSession(arithmetic.spell_out(proto).SerializeToString())
    found = np.asarray(session.run(None, {"x": x.astype(np.float32)})[0])
    product = x * w
    expected = ((product + w).T * product).astype(np.float32)
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    wide = x.astype(np.float32) * w.astype(np.float32)
    assert not np.array_equal(((wide + w).T * wide).astype(np.float16).astype(np.float32), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "onnxruntime", "dtype": torch.float16}, "onnxruntime computes in float32, not in float16"),
        ({"target": "onnxruntime", "dtype": "auto"}, "onnxruntime computes in float32, not in bfloat16"),
        ({"dtype": torch.bfloat16}, "dtype is bfloat16, which ai100 does not compute in"),
        ({"dtype": "float16", "materialize": True}, "materialize writes float32 weights, and dtype asks for float16"),
        ({"dtype": "float8"}, "dtype must be 'float32' or 'float16' or 'bfloat16' or 'auto', not 'float8'"),
        ({"dtype": torch.float64}, "not 'float64'"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint("llama", "bfloat16", tmp_path))
    with pytest.raises(CompileError, match=said):
        model.compile(**{**SHAPES, **options})


def test_float32_is_what_it_was() -> None:
    backend, source = find_backend("ai100"), support.Lowered("llama")
    assert {read_options(backend, {"dtype": d}).dtype for d in (None, "float32", torch.float32)} == {"float32"}
    model = QEFFAutoModelForCausalLM._opened(source)
    model.compile(**SHAPES, dtype=torch.float32)
    assert not {v.dtype for node in graph_of(model).graph for v in node.outputs} & HALVES


def test_quantized_weights_are_refused() -> None:
    module = support.canonical("llama")
    with pytest.raises(PassError, match="weights of 4 bits are multiplied by an operator that takes float32"):
        support.apply(module, f"quantize-weights{{bits=4 block=16}},{support.rest_of('ai100')},dtype")
    module = support.canonical("llama")
    with pytest.raises(PassError, match=r"weight' is quantized, and its numbers are float32: leave out dtype"):
        support.apply(module, "quantize-weights{bits=8 block=16},kv-retention,attention,dtype")


def test_a_second_type_is_refused() -> None:
    module: Module = support.canonical("llama")
    support.apply(module, support.rest_of("ai100") + ",dtype")
    before = len(module.graph)
    support.apply(module, "dtype")
    assert len(module.graph) == before
    with pytest.raises(PassError, match="another type of 16 bits"):
        support.apply(module, "dtype{type=bfloat16}")


ONCE = {("llama", "float16"), ("gpt2", "bfloat16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in ONCE else pytest.mark.nightly)
        for dtype in HARDWARE
        for name in ROWS
    ],
)
def test_answers_as_transformers_loaded_in_it(name: str, dtype: str, tmp_path: Path, record_property: Any) -> None:
    """The bound is that of float32 with the roundoff of the type; how far the type drifts from float32 is told."""
    _, model = models.build_of(ROWS[name])
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    exact = reference_trace(model, PROMPTS, STEPS)
    theirs = reference_trace(half, PROMPTS, STEPS, follow=exact.tokens)
    ours = compiled(tmp_path, getattr(torch, dtype), **HARDWARE[dtype])
    trace = session_trace(ours.runner(threads=1).decoder, PROMPTS, exact.tokens)

    bound = numerics.bound(depth_of(ours), TYPES[dtype])
    worst = max(error_over_rms(a, b) for a, b in zip(trace.logits, theirs.logits, strict=True))
    drift = [
        max(error_over_rms(a, b) for a, b in zip(found.logits, exact.logits, strict=True)) for found in (trace, theirs)
    ]
    for key, value in {"error": worst, "bound": bound, "our drift": drift[0], "their drift": drift[1]}.items():
        record_property(key, value)
    assert worst <= bound
    # Computed in the type, and not in float32; and no further from float32 than transformers is.
    assert bound / 100 < drift[0] < max(bound, 2 * drift[1])


def test_float32_stays_where_transformers_computes_in_it(tmp_path: Path) -> None:
    """Squares of these activations are beyond float16; norms of them are not."""
    _, model = support.tiny("llama")
    weights = {k: t * 3000 if k == "model.embed_tokens.weight" else t for k, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert 256 < half.model.embed_tokens.weight.abs().max() < 65504
    tokens = np.array([[5, 6], [7, 8]])
    theirs = reference_trace(half, PROMPTS, 2, follow=tokens)
    ours = session_trace(compiled(tmp_path, "float16").runner(threads=1).decoder, PROMPTS, tokens)
    bound = numerics.bound(numerics.depth(support.lowered("llama")), ir.DataType.FLOAT16)
    assert all(error_over_rms(a, b) <= bound for a, b in zip(ours.logits, theirs.logits, strict=True))
