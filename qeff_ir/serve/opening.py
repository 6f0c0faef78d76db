"""From a compiled model to what is served."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from backends import find_backend
from qeff_ir.auto.adapted import AdaptedModel
from qeff_ir.ir.snapshot import load_module
from qeff_ir.package import SIDE_FOLDER
from qeff_ir.serve.guided import Guide
from qeff_ir.serve.model import Served, Writer
from qeff_ir.side_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.auto.embedding import QEFFAutoModel
    from qeff_ir.compiler import Compiled


def writes(package: Compiled) -> bool:
    """Whether a package writes texts, with a cache of what was written; others embed them."""
    return bool(load_module(find_backend(package.manifest.target).model_file(package.folder)).states)


def serve_writer(model: QEFFAutoModelForCausalLM, name: str, *, queue: int = 256, threads: int | None = None) -> Served:
    """A compiled causal LM, its session opened, with its adapters.

    Args:
        model: The model; its loaded adapters are served by their names.
        name: What requests call it.
        queue: Requests that may wait for a slot.
        threads: Threads of the session; the runtime's own choice by default.

    Raises:
        AdapterError: The model is compiled for one adapter at a time.
        QeffError: The package, or its tokenizer, cannot be opened.
    """
    runner = model.runner(threads)
    slots = {name: model.slot_of(name) for name in model.adapters} if isinstance(model, AdaptedModel) else {}
    tokenizer = read_tokenizer(model.package.folder / SIDE_FOLDER)
    engine = model.engine(queue=queue)
    stops = _stop_tokens(runner.generation_config, tokenizer)
    writer = Writer(engine, tokenizer, stops, Guide(tokenizer, engine.vocabulary, stops))
    return Served(name, int(time.time()), writer, adapters=slots)


def serve_embedder(model: QEFFAutoModel, name: str, threads: int | None = None) -> Served:
    """A compiled model that embeds texts, its session opened.

    Args:
        model: The model.
        name: What requests call it.
        threads: Threads of the session; the runtime's own choice by default.

    Raises:
        QeffError: The package, or its tokenizer, cannot be opened.
    """
    model.encoder(threads)
    model.tokenizer()
    return Served(name, int(time.time()), embedder=model)


def _stop_tokens(defaults: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: those of the model's generation defaults, else the tokenizer's."""
    given: Any = tokenizer.eos_token_id if defaults.eos_token_id is None else defaults.eos_token_id
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
