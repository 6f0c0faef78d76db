"""GGUF files: one file is the model, with transformers' own reading of numbers, configuration and tokenizer."""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.arrays import Array
from qeff_ir.cli.lowered import LoweredOnce
from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError
from qeff_ir.frontend.source import open_source
from qeff_ir.numerics import bound, depth
from qeff_ir.quantized import quantized
from qeff_ir.ranges import stored_in
from qeff_ir.testing.trace import compare, reference_trace, session_trace
from tests.gguf_files import Kind, tiny, write
from tests.support import prompts

NARROW = {
    "blk.0.attn_q.weight": Kind.Q4_0, "blk.0.attn_k.weight": Kind.Q8_0, "blk.1.attn_q.weight": Kind.F16,
    "blk.0.ffn_up.weight": Kind.Q4_1, "blk.1.ffn_down.weight": Kind.BF16, "output.weight": Kind.F32,
    "blk.1.ffn_gate.weight": Kind.Q5_0, "blk.1.attn_v.weight": Kind.Q5_1,
}  # fmt: skip
WIDE = {
    "blk.0.attn_output.weight": Kind.Q4_K, "blk.1.attn_output.weight": Kind.Q5_K, "blk.0.ffn_down.weight": Kind.Q6_K,
}  # fmt: skip
CASES: dict[str, tuple[Kind, dict[str, Kind]]] = {
    "llama": (Kind.Q8_0, {**NARROW, **WIDE}),
    "qwen2": (Kind.Q4_0, NARROW),
    "qwen3_moe": (Kind.Q8_0, {"blk.0.ffn_gate_exps.weight": Kind.Q4_0}),
}


def file(name: str, folder: Path, **more: Any) -> Path:
    kind, kinds = CASES[name]
    folder.mkdir(exist_ok=True)
    return write(folder / "model.gguf", *tiny(name), kind, kinds=kinds, **more)


def oracle(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_own_reading(name: str, tmp_path: Path) -> None:
    path, rows = file(name, tmp_path / "model"), prompts([11, 5])
    source, reference = LoweredOnce(open_source(path)), reference_trace(oracle(path), rows, 3)
    limit = bound(depth(source.lower()))
    for target in ("onnxruntime", "ai100"):
        model = QEFFAutoModelForCausalLM._opened(source)
        model.compile(target=target, batch_size=2, prefill_seq_len=8, ctx_len=16, emit_only=target == "ai100")
        found = compare(session_trace(model.runner(threads=1).decoder, rows, reference.tokens), reference)
        assert found.equal(limit)


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    path = file(name, tmp_path / "model")
    weights, theirs = open_source(path).weights(), oracle(path).state_dict()
    assert weights.keys() == theirs.keys()
    assert [n for n, t in theirs.items() if not np.array_equal(weights[n].numpy().astype(np.float32), t.numpy())] == []


def test_the_table_of_names_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for it once a module, which takes minutes for a model of many layers."""
    path, made, asked = file("llama", tmp_path / "model"), gguf.get_tensor_name_map, list[int]()

    def counted(architecture: Any, layers: int) -> Any:
        asked.append(layers)
        return made(architecture, layers)

    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    assert open_source(path).weights() and asked == [2]


def test_blocks_without_offsets_stay_codes_and_scales(tmp_path: Path) -> None:
    """Moved rows too; what has an offset in its blocks (Q4_1, Q4_K, …) is numbers."""
    weights = open_source(file("llama", tmp_path / "model")).weights()
    found = {name: parts for name, tensor in weights.items() if (parts := quantized(tensor)) is not None}
    kinds = {name: (parts.codes.dtype.name, parts.block) for name, parts in found.items()}
    layer = "model.layers.0."
    assert kinds[f"{layer}self_attn.q_proj.weight"] == ("UINT4", 32)
    assert kinds[f"{layer}self_attn.k_proj.weight"] == kinds["model.embed_tokens.weight"] == ("INT8", 32)
    assert kinds[f"{layer}mlp.down_proj.weight"] == ("INT8", 16)
    assert not kinds.keys() & {f"{layer}mlp.up_proj.weight", f"{layer}self_attn.o_proj.weight", "lm_head.weight"}
    assert all(parts.problem() is None for parts in found.values())
    own = [t for t in gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors if t.name == "blk.0.attn_q.weight"]
    assert found[f"{layer}self_attn.q_proj.weight"].nbytes == own[0].n_bytes + 256 * 32 // 32 // 2  # zeros of 4 bits


def test_the_writer_of_these_tests_writes_what_is_read(tmp_path: Path) -> None:
    config, model = tiny("llama")
    weights = open_source(write(tmp_path / "m.gguf", config, model)).weights()
    assert all(np.array_equal(weights[n].numpy(), t.numpy()) for n, t in model.state_dict().items())


def test_a_plain_file_stays_where_it_is_in_every_form_of_package(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", *tiny("qwen2"), Kind.BF16)
    assert all(stored_in(tensor) is not None for tensor in open_source(path).weights().values())
    answers: list[Array] = []
    for target, options in (("onnxruntime", {}), ("ai100", {"weight_free": True})):
        model: Any = QEFFAutoModelForCausalLM.from_pretrained(path)
        shapes = {"prefill_seq_len": 8, "ctx_len": 24, "emit_only": target == "ai100", **options}
        model.compile(target=target, compile_dir=tmp_path / target, **shapes)
        answers.append(model.runner(threads=1).decoder.prefill(prompts([11])))
    assert (tmp_path / "onnxruntime" / "weights" / "model.gguf").read_bytes() == path.read_bytes()
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-5 * float(np.ptp(answers[0])))


def test_a_tensor_of_twice_the_scale_is_a_parameter_of_twice_the_numbers(tmp_path: Path) -> None:
    """So that each is read, and none twice; the logits of one of them differ too."""
    path = file("llama", tmp_path / "model")
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    before = {name: tensor.numpy().copy() for name, tensor in open_source(path).weights().items()}
    seen: list[str] = []
    for name in names:

        def double(tensors: dict[str, Array], name: str = name) -> None:
            tensors[name] = tensors[name] * np.float32(2)

        after = open_source(file("llama", tmp_path / "model", change=double)).weights()
        changed = [own for own, tensor in after.items() if not np.array_equal(tensor.numpy(), before[own])]
        assert len(changed) == 1
        np.testing.assert_allclose(after[changed[0]].numpy(), 2 * before[changed[0]], rtol=5e-3, atol=2e-4)
        seen += changed
    assert sorted(seen) == sorted(before)


def _more(tensors: dict[str, Array]) -> None:
    tensors["rope_freqs.weight"] = np.ones(4, np.float32)


def _less(tensors: dict[str, Array]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def _half(tensors: dict[str, Array]) -> None:
    del tensors["blk.1.ffn_up_exps.weight"]


def _longer(tensors: dict[str, Array]) -> None:
    tensors["output_norm.weight"] = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("name", "change", "error", "says"),
    [
        ("llama", _more, UnsupportedModelError, "'rope_freqs.weight', and transformers would leave them out"),
        ("llama", _less, ModelLoadError, r"lacks 1 tensors .* 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("qwen3_moe", _half, ModelLoadError, r"ffn_gate_exps\.weight of .* are not all of"),
        ("llama", _longer, ModelLoadError, r"'model\.norm\.weight' .* has shape \[64\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, change: Callable[[dict[str, Array]], None], error: type[QeffError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        open_source(file(name, tmp_path / "model", change=change)).weights()


def test_the_tokenizer_is_transformers_own_with_its_chat_template(tmp_path: Path) -> None:
    path = file("llama", tmp_path / "model", tokens=True)
    (path.parent / "tokenizer_config.json").write_text("no JSON: nothing beside the file is read")
    source, saved = open_source(path), tmp_path / "saved"
    saved.mkdir()
    source.save_side_files(saved)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    ours, theirs = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    text, chat = "ab <s>aba b", [{"role": "user", "content": "ab"}]
    assert ours(text).input_ids == theirs(text).input_ids and len(ours(text).input_ids) > 4
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def test_a_file_answers_as_transformers_does(tmp_path: Path) -> None:
    path = file("llama", tmp_path / "model", tokens=True)
    model: Any = QEFFAutoModelForCausalLM.from_pretrained(path)
    model.compile(target="onnxruntime", prefill_seq_len=8, ctx_len=24)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    asked = {**tokenizer("abab", return_tensors="pt"), "max_new_tokens": 8, "do_sample": False}
    assert model.generate(**asked).tolist() == oracle(path).generate(**asked).tolist()


def test_nothing_is_read_without_the_package_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file("llama", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelLoadError, match=r"is a GGUF file, .*: pip install 'qeff-ir\[gguf\]'"):
        open_source(path)


def test_a_file_of_another_place_or_kind_is_refused(tmp_path: Path) -> None:
    path = file("llama", tmp_path / "model")
    (tmp_path / "inside").mkdir()
    with pytest.raises(ModelLoadError, match="not inside of the model folder"):
        open_source(tmp_path / "inside", gguf_file=f"../model/{path.name}")
    (tmp_path / "inside" / "link.gguf").symlink_to(path)
    with pytest.raises(ModelLoadError, match="outside of"):
        open_source(tmp_path / "inside", gguf_file="link.gguf")
    with pytest.raises(ModelLoadError, match=r"only model\.gguf\): pass gguf_file='model\.gguf'"):
        open_source(_with_config(path.parent))


def _with_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_damage_is_told_before_a_library_reads_the_file(tmp_path: Path) -> None:
    """Counts and lengths of each kind, far too large: a library that took them at their word would never end."""
    path = file("llama", tmp_path / "model", tokens=True)
    whole = path.read_bytes()
    tokens, scores = whole.index(b"tokenizer.ggml.tokens"), whole.index(b"tokenizer.ggml.token_type")
    table = whole.index(b"output_norm.weight")
    huge = struct.pack("<Q", 1 << 62)
    damages = {
        "magic": b"GGUX" + whole[4:],
        "version": whole[:4] + struct.pack("<I", 9) + whole[8:],
        "tensors": whole[:8] + huge + whole[16:],
        "pairs": whole[:16] + huge + whole[24:],
        "key": whole[:24] + huge + whole[32:],
        "texts": whole[: tokens + 29] + huge + whole[tokens + 37 :],
        "numbers": whole[: scores + 33] + huge + whole[scores + 41 :],
        "array": whole[: scores + 29] + struct.pack("<I", 9) + whole[scores + 33 :],
        "size": whole[: table + 22] + huge + whole[table + 30 :],
        "offset": whole[: table + 34] + huge + whole[table + 42 :],
        "type": whole[: table + 30] + struct.pack("<I", 999) + whole[table + 34 :],
        "end": whole[:-400],
        "half": whole[: len(whole) // 8],
        "nothing": b"",
    }
    for data in damages.values():
        path.write_bytes(data)
        with pytest.raises((ModelLoadError, UnsupportedModelError), match=str(path)):
            open_source(path)


def test_a_file_that_is_changed_is_told(tmp_path: Path) -> None:
    path = file("llama", tmp_path / "model")
    source = open_source(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelLoadError, match="was changed or removed"):
        source.weights()
