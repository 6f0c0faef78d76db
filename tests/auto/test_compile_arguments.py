"""Arguments of the incumbent's ``compile``: dropped where they change nothing, refused by what they ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.auto.compile_arguments import _KNOWN, compiler_flags
from qeff_ir.errors import CompileError

CONTRACT = Path(__file__).parents[2] / "backends" / "ai100" / "contract.md"
ELSEWHERE = {
    "compile_dir", "seq_len", "prefill_seq_len", "ctx_len", "batch_size", "num_devices", "num_cores",
    "mxfp6_matmul", "mxint8_kv_cache", "encoder_ctx_len", "skip_vision", "skip_lang", "img_size",
}  # fmt: skip
"""Arguments of ours, and of models that are not compiled yet."""


def test_every_argument_of_the_contract_is_known() -> None:
    section = CONTRACT.read_text().split("### 4.6")[1].split("### 4.7")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    names = {name for row in rows for name in re.findall(r"[a-z_0-9]+", row.replace("prefill/decode", "prefill"))}
    names -= {"always", "passed"}
    assert len(names) > 25 and names - ELSEWHERE <= _KNOWN.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {"full_batch_size": None},
        {"prefill_only": False},
        {"offload_pt_weights": True, "dynamo": True},
        {"moe_prefill_packed_chunk_size": 256, "use_onnx_subfunctions": False},
    ],
)
def test_what_changes_nothing_is_dropped(arguments: dict[str, Any]) -> None:
    assert compiler_flags({**arguments, "mos": 2}) == {"mos": 2}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"full_batch_size": 4}, "full_batch_size=4 asks for continuous batching, which is not supported: leave"),
        ({"num_speculative_tokens": 0}, "speculative decoding"),
        ({"comp_ctx_lengths_decode": [128]}, "compute context lengths"),
        ({"prefill_only": 1}, "prefill on devices of its own"),
        ({"use_onnx_subfunctions": True}, "sub_functions=True does"),
    ],
)
def test_what_is_not_there_is_refused_by_what_it_asks_for(arguments: dict[str, Any], what: str) -> None:
    model = QEFFAutoModelForCausalLM.__new__(QEFFAutoModelForCausalLM)
    with pytest.raises(CompileError, match=re.escape(what)):
        model.compile(target="ai100", force_flags=True, **arguments)
