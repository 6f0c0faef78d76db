"""A model that adds two numbers, behind a real server."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.demo import MODEL_FOLDER
from qeff_ir.serve.app import Limits
from qeff_ir.serve.opening import serve_writer

from .servers import NAME, Running, running

CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with three slots, and a chat template that writes what was said as it is."""
    source = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(MODEL_FOLDER, source)
    (source / "chat_template.jinja").write_text(CHAT)
    out = source.parent / "package"
    QEFFAutoModelForCausalLM.from_pretrained(source).compile(
        target="onnxruntime", ctx_len=128, prefill_seq_len=8, compile_dir=out, batch_size=3
    )
    return out


@pytest.fixture(scope="session")
def alone(package: Path) -> Callable[..., str]:
    """What the package answers to one prompt, alone and greedily."""
    model = QEFFAutoModelForCausalLM.from_package(package)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)

    def ask(prompt: str, tokens: int = 12) -> str:
        return model.generate(prompts=[prompt], tokenizer=tokenizer, max_new_tokens=tokens).generated_texts[0]

    return ask


@pytest.fixture(scope="session")
def serve(package: Path) -> Serve:
    """Serve the package, with a queue and limits of one's own."""

    @contextlib.contextmanager
    def start(queue: int = 64, limits: Limits | None = None) -> Generator[Running]:
        model = QEFFAutoModelForCausalLM.from_package(package)
        with running(serve_writer(model, NAME, queue=queue), limits) as found:
            yield found

    return start


@pytest.fixture(scope="session")
def server(serve: Serve) -> Iterator[Running]:
    """One server for all tests that leave it as it is."""
    with serve() as found:
        yield found
