"""Adapters are models of their own to those who ask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qeff_ir import QEffAutoPeftModelForCausalLM
from qeff_ir.demo import ADAPTERS_FOLDER, TASKS
from qeff_ir.serve.opening import serve_writer

from .servers import NAME, running


def test_requests_name_their_adapters(tmp_path: Path) -> None:
    first, second = TASKS
    model = QEffAutoPeftModelForCausalLM.from_pretrained(ADAPTERS_FOLDER / first, first)
    model.compile(
        target="onnxruntime", ctx_len=64, max_lora_rank=8, lora_targets="all-linear", compile_dir=tmp_path / "package"
    )
    model.load_adapter(ADAPTERS_FOLDER / second, second)
    asked = [(name, pair) for pair in ((9, 4), (3, 8)) for name in (NAME, first, second)]
    with running(serve_writer(model, NAME)) as server:
        client = server.client
        assert [found.id for found in client.models.list()] == [NAME, first, second]

        def ask(name: str, pair: tuple[int, int]) -> str:
            prompt = f"{pair[0]}+{pair[1]}="
            return client.completions.create(model=name, prompt=prompt, temperature=0).choices[0].text

        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda one: ask(*one), asked))
    assert answers == [str(TASKS.get(name, int.__add__)(*pair)) for name, pair in asked]
