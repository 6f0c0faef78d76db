"""Caches of 8 bits: they hold what the form has, answer as rounded float32 caches do, and the package says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from backends.ai100 import mxint8
from backends.ai100.emulator import EmulatedSession
from backends.onnxruntime.passes.kv_cache import _decoded, _encoded
from backends.onnxruntime.session import OrtSession
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.arrays import Array
from qeff_ir.debug.drift import fast_parts
from qeff_ir.errors import CompileError, PipelineError
from qeff_ir.ir.module import Module
from qeff_ir.numerics import error_over_rms
from qeff_ir.package import read_manifest
from qeff_ir.passing import Pass, Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.properties import FAST
from qeff_ir.runtime.decoder import Decoder
from tests import support
from tests.support import PROMPTS

STEPS = [[5, 6], [7, 8], [9, 10]]


@dataclass(frozen=True, slots=True)
class RoundNew(Pass):
    """What a cache is given is rounded, and kept as float32."""

    name: ClassVar[str] = "round-new"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for state in (s for s in module.states if s.has_slots):
            write = module.output(state.output).producer()
            assert write is not None and write.op_type == "TensorScatter" and rewriter.rewrite("cache")
            width, b = int(state.shape[3]), rewriter.at(write)
            block = int(np.gcd(width, 32))
            new = _encoded(write.inputs[1], width, block, b)
            write.replace_input_with(1, _decoded(new, width, block, b))


def decoders(name: str, folder: Path) -> tuple[Decoder, Decoder, Decoder]:
    """Of a tiny model: with caches of 8 bits, with rounded ones in float32, and as it is."""
    rest = Pipeline.parse(support.rest_of("onnxruntime")).without("ort-attention").without("ort-rotary")
    made: list[Decoder] = []
    for more in (Pipeline.parse("kv-cache"), RoundNew(), Pipeline()):
        text = rest.insert_after("kv-retention", more)
        made.append(_opened(support.canonical(name), text, folder / str(len(made))))
    return made[0], made[1], made[2]


def _opened(module: Module, pipeline: Pipeline, folder: Path) -> Decoder:
    from backends.onnxruntime.backend import BACKEND

    run_pipeline(module, pipeline, check=2)
    BACKEND.emit(module, folder, support.OPTIONS)
    return Decoder(BACKEND.open(folder, threads=1))


def answers(decoder: Decoder) -> Array:
    return np.stack([decoder.prefill(PROMPTS), *(decoder.decode(tokens) for tokens in STEPS)])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3n", "deepseek-v32", "gpt-oss"])
def test_caches_of_8_bits_answer_as_rounded_ones(name: str, tmp_path: Path) -> None:
    """Windows, layers that share caches, and those of an indexer among them."""
    small, rounded, exact = decoders(name, tmp_path)
    caches = [s for s in small.session.interface.residents if s.has_slots]
    assert caches and all(state.dtype == ir.DataType.INT8 for state in caches)
    own = answers(small)
    np.testing.assert_allclose(own, answers(rounded), atol=1e-6)
    assert 1e-5 < error_over_rms(own, answers(exact)) < 0.5  # an indexer that chooses other keys goes far


def test_what_is_kept_is_the_form_of_the_specification(tmp_path: Path) -> None:
    small, _, exact = decoders("qwen3", tmp_path)
    for decoder in (small, exact):
        decoder.prefill(PROMPTS)
        assert isinstance(decoder.session, OrtSession)
    for kind in ("past_key.0", "past_value.0"):
        codes, whole = (d.session._residents[kind].numpy() for d in (small, exact))  # pyright: ignore[reportAttributeAccessIssue]
        assert codes.dtype == np.int8 and codes.shape == (*whole.shape[:3], 17) and whole.shape[3] == 16
        assert codes.nbytes * 3.7 < whole.nbytes
        held = np.ldexp(codes[..., :16].astype(np.float32), codes[..., 16:].astype(np.int32) - 6)
        np.testing.assert_array_equal(held, mxint8.rounded(whole))
        assert np.ptp(held) > 0 and not held[1, :, 5 + 3 * 8 :].any()


def test_numbers_are_rounded_to_the_nearest_of_their_block() -> None:
    drawn = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32) * np.exp2(np.arange(50) - 25)[:, None]
    found = mxint8.rounded(drawn.astype(np.float32))
    blocks = np.abs(drawn.reshape(50, 2, 32))
    steps = np.exp2(np.floor(np.log2(blocks.max(-1, keepdims=True))) - 6)
    wrong = np.abs(found.reshape(50, 2, 32) - drawn.reshape(50, 2, 32)) / steps
    assert wrong[blocks < 127 * steps].max() <= 0.5 and wrong.max() <= 1
    np.testing.assert_array_equal(mxint8.rounded(found), found)
    assert mxint8.rounded(np.zeros((2, 24), np.float32)).shape == (2, 24)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QEFFAutoModelForCausalLM:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    return QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))


SHAPES: dict[str, Any] = {"batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48, "emit_only": True}


@pytest.mark.parametrize(
    ("target", "said"), [("onnxruntime", "the pass kv-cache"), ("ai100", "the option mxint8_kv_cache")]
)
def test_a_package_with_rounded_caches_is_fast_and_near(
    target: str, said: str, model: QEFFAutoModelForCausalLM
) -> None:
    found: list[Array] = []
    for small in (False, True):
        folder = Path(model.compile(target=target, **SHAPES, mxint8_kv_cache=small))
        assert fast_parts(read_manifest(folder)) == ([said] if small else [])
        found.append(answers(model.runner(threads=1).decoder))
    assert 1e-5 < error_over_rms(found[1], found[0]) < 0.1


def test_the_emulator_rounds_all_that_the_card_is_told_to(model: QEFFAutoModelForCausalLM) -> None:
    model.compile(target="ai100", **SHAPES, mxint8_kv_cache=True)
    decoder = model.runner(threads=1).decoder
    decoder.prefill(PROMPTS)
    assert isinstance(decoder.session, EmulatedSession)
    states = {name: value.numpy() for name, value in decoder.session._states.items()}
    assert len(states) == 4 and all(np.ptp(numbers) > 0 for numbers in states.values())
    for numbers in states.values():
        np.testing.assert_array_equal(mxint8.rounded(numbers), numbers)


def test_what_cannot_be_rounded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    recurrent = QEFFAutoModelForCausalLM._opened(support.Lowered("mamba"))
    with pytest.raises(CompileError, match=r"caches of keys and values, of which Mamba.* has none that can be rounded"):
        recurrent.compile(target="onnxruntime", **SHAPES, mxint8_kv_cache=True)
    with pytest.raises(PipelineError, match="requires the property 'tensor-scatter-layout'"):
        support.apply(support.canonical("llama"), "kv-retention,kv-cache")
    module = support.canonical("llama")
    report = support.apply(
        module, "kv-retention{layout=tensor-scatter},attention{impl=standard},ort-attention,kv-cache"
    )
    assert {missed.reason for missed in report.runs[-1].stats.missed} == {"a GroupQueryAttention writes the cache"}
    assert FAST in module.properties and not any(s.dtype == ir.DataType.INT8 for s in module.states)
