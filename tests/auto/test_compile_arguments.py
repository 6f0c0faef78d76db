"""Arguments of the incumbent's ``compile``: dropped where they change nothing, refused by what they ask for."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from backends.options import CompileOptions
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.auto.compile_arguments import _DEFAULTS, _KNOWN, compiler_flags
from qeff_ir.auto.qaic_config import compile_options, loaded, pipeline_edits
from qeff_ir.errors import CompileError

CONTRACT = Path(__file__).parents[2] / "backends" / "ai100" / "contract.md"
ELSEWHERE = {
    "compile_dir", "seq_len", "prefill_seq_len", "ctx_len", "batch_size", "num_devices", "num_cores",
    "full_batch_size", "kv_cache_batch_size",
    "mxfp6_matmul", "mxint8_kv_cache", "encoder_ctx_len", "skip_vision", "skip_lang", "img_size",
}  # fmt: skip
"""Arguments of ours, and of models that are not compiled yet."""


def test_every_argument_of_the_contract_is_known() -> None:
    section = CONTRACT.read_text().split("### 4.6")[1].split("### 4.7")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    names = {name for row in rows for name in re.findall(r"[a-z_0-9]+", row.replace("prefill/decode", "prefill"))}
    names -= {"always", "passed"}
    assert len(names) > 25 and names - ELSEWHERE <= _KNOWN.keys() | _DEFAULTS.keys()
    assert _DEFAULTS.keys() - {"enable_qnn"} <= {field.name for field in fields(CompileOptions)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"full_batch_size": None},
        {"encoder_ctx_len": None, "image_size": None, "bake_adapters": False},
        {
            "num_speculative_tokens": None,
            "prefill_only": None,
            "kv_cache_prefix": None,
            "comp_ctx_lengths_decode": None,
        },
        {"offload_pt_weights": True, "dynamo": True},
        {"moe_prefill_packed_chunk_size": 256, "use_onnx_subfunctions": False},
    ],
)
def test_what_changes_nothing_is_dropped(arguments: dict[str, Any]) -> None:
    assert compiler_flags({**arguments, "mos": 2}) == {"mos": 2}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            {"enable_chunking": True},
            "enable_chunking=True asks for prefill on devices of its own, which is not supported: leave",
        ),
        ({"use_onnx_subfunctions": True}, "sub_functions=True does"),
        ({"bake_adapters": True}, "bake_adapters is an option of QEffAutoPeftModelForCausalLM: open the model as one"),
        ({"image_size": (3, 3)}, "image_size is an option of QEFFAutoModelForImageTextToText"),
        ({"encoder_ctx_len": 8}, "encoder_ctx_len is an option of QEFFAutoModelForSeq2SeqLM"),
    ],
)
def test_what_is_not_there_is_refused_by_what_it_asks_for(arguments: dict[str, Any], what: str) -> None:
    model = QEFFAutoModelForCausalLM.__new__(QEFFAutoModelForCausalLM)
    with pytest.raises(CompileError, match=re.escape(what)):
        model.compile(target="ai100", force_flags=True, **arguments)


@pytest.mark.parametrize(
    ("asked", "given", "options"),
    [
        ({}, {"mos": 2}, {"mos": 2}),
        ({"continuous_batching": False, "qaic_config": None}, {}, {}),
        ({"qaic_config": {"ccl_enabled": True}}, {}, {"ccl_enabled": True}),
        ({"qaic_config": {"ccl_enabled": True}}, {"ccl_enabled": False}, {"ccl_enabled": False}),
        ({}, {"qaic_config": {"ccl_enabled": True}}, {"ccl_enabled": True}),
        (
            {"qaic_config": {"speculative_model_type": "target", "include_sampler": False, "max_top_k_ids": 512}},
            {"num_speculative_tokens": 3},
            {"num_speculative_tokens": 3},
        ),
        ({"continuous_batching": True}, {"full_batch_size": 4}, {"full_batch_size": 4}),
    ],
)
def test_what_a_model_was_opened_with_is_asked_of_compile(
    asked: dict[str, Any], given: dict[str, Any], options: dict[str, Any]
) -> None:
    rest, kept = loaded({**asked, "revision": "main"})
    assert rest == {"revision": "main"} and compile_options(kept, given) == options


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"continuous_batching": True}, "continuous_batching=True needs the rows of the caches: give compile("),
        ({"qaic_config": {"speculative_model_type": "target"}}, "and compile has no num_speculative_tokens"),
        (
            {"qaic_config": {"speculative_model_type": "turbo"}},
            "speculative_model_type='turbo', which is not",
        ),
        ({"qaic_config": {"mla_absorption": {}}}, "caches of another form than the model's"),
        ({"qaic_config": {"ccl_enable": True}}, "the unknown setting 'ccl_enable'; did you mean 'ccl_enabled'?"),
        ({"qaic_config": {"include_sampler": "yes"}}, "qaic_config has include_sampler='yes' with"),
        ({"qaic_config": {"enable_blocking": "kv"}}, "qaic_config has enable_blocking='kv' with"),
        ({"qaic_config": {"replicate_kv_heads": [2]}}, "qaic_config has replicate_kv_heads=[2] with"),
        ({"qaic_config": "ccl_enabled"}, "qaic_config is 'ccl_enabled': give its settings by name"),
    ],
)
def test_what_a_model_cannot_be_opened_with_is_told(asked: dict[str, Any], what: str) -> None:
    model = QEFFAutoModelForCausalLM.__new__(QEFFAutoModelForCausalLM)._asking(loaded(asked)[1])
    with pytest.raises(CompileError, match=re.escape(what)):
        model.compile(target="ai100")


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        ({"include_sampler": False, "max_top_k_ids": 512, "return_pdfs": True, "enable_blocking": None}, ""),
        ({"include_sampler": True}, "+sampling"),
        (
            {"include_sampler": True, "return_pdfs": True, "max_top_k_ids": 64, "include_guided_decoding": False},
            "+sampling{pdfs=true top=64 guided=false}",
        ),
        ({"replicate_kv_heads": True}, "+replicate-kv-heads<kv-retention"),
        ({"replicate_kv_heads": 2}, "+replicate-kv-heads{n=2}<kv-retention"),
        (
            {"enable_blocking": True, "blocking_mode": "kv", "num_kv_blocks": 4, "skip_kv": True},
            "+blocked-attention{mode=kv num-kv-blocks=4}<attention",
        ),
    ],
)
def test_settings_ask_for_passes(config: dict[str, Any], edits: str) -> None:
    assert pipeline_edits({"qaic_config": config}, {}) == pipeline_edits({}, {"qaic_config": config}) == edits
    assert compile_options({"qaic_config": config}, {}) == {}
