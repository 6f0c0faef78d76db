"""``qeff serve``: answer requests over HTTP, as OpenAI's clients send them."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_ir.cli.embed import compile_embedder
from qeff_ir.cli.models import compile_source, compiling, open_model, refuse_options
from qeff_ir.cli.request import Request, with_request
from qeff_ir.cli.terminal import line, quiet_transformers, working
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.reading import path_of

if TYPE_CHECKING:
    from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.auto.embedding import QEFFAutoModel
    from qeff_ir.serve.model import Served

_NEEDS = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")
_CTX_LEN = 2048
"""Of a model that is compiled to be served, where nothing else is asked for and the model has as many positions."""
_SLOTS = 8
"""Requests at once of a model that is compiled to be served, where no number of rows is asked for."""
_SERVER = "Server"


@with_request
def command(
    model: Annotated[
        str, typer.Argument(help="A package, a model folder or a hub id.", metavar="MODEL_OR_OUT", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach 0.0.0.0.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535, rich_help_panel=_SERVER)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the model; its folder's name by default.", rich_help_panel=_SERVER),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA adapter, which requests name as their model; may be given more than once.",
            metavar="NAME=FOLDER",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Serve embeddings of a model folder.", rich_help_panel=_SERVER)
    ] = False,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are answered 429.", min=1, rich_help_panel=_SERVER)
    ] = 256,
    drain: Annotated[
        int, typer.Option(help="Seconds that requests have to end after Ctrl-C.", min=1, rich_help_panel=_SERVER)
    ] = 60,
    threads: Annotated[
        int | None,
        typer.Option(help="Of the session; the runtime's choice by default.", min=1, rich_help_panel=_SERVER),
    ] = None,
    *,
    request: Request,
) -> None:
    """Serve a package, or a model (compiled into the cache first), to OpenAI's clients (extra `serve`).

    A model is compiled for 2,048 tokens of context, or as many as it has positions, unless --ctx-len says otherwise,
    and for 8 requests at once unless --full-batch-size does.
    """
    missing = next((needs for needs in _NEEDS if importlib.util.find_spec(needs) is None), None)
    if missing is not None:
        raise RuntimeInputError(f"qeff serve needs {missing}: pip install 'qeff-ir[serve]'")
    from qeff_ir.serve.server import listen, serve

    adapters = [_adapter(text) for text in adapter or ()]
    listening = listen(host, port)  # before what takes long
    with listening:
        served = _open(model, name or Path(model).name or model, adapters, embed, queue, threads, request)
        where, at = listening.getsockname()[:2]
        shown = f"[{where}]" if ":" in where else where
        line("Serving ", (served.name, "bold"), f" at http://{shown}:{at}/v1", *(f", {a}" for a in served.adapters))
        serve(served, listening, drain)


def _adapter(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not sign or not name or not folder:
        raise RuntimeInputError(f"--adapter {text} does not say what it is called: give NAME=FOLDER")
    return name, folder


def _open(
    model: str,
    name: str,
    adapters: list[tuple[str, str]],
    embed: bool,
    queue: int,
    threads: int | None,
    request: Request,
) -> Served:
    """What a package, or a model, serves.

    Raises:
        QeffError: It cannot be opened or compiled, or an option does not fit it.
    """
    from qeff_ir.package import SIDE_FOLDER, is_package

    folder = path_of(model, "the model")
    packaged = is_package(folder) or (folder / SIDE_FOLDER).is_dir()
    if packaged:
        refuse_options(model, (*request.given, *(["embed"] if embed else [])))
    quiet_transformers()
    found: QEFFAutoModelForCausalLM | QEFFAutoModel
    if packaged:
        found = _open_package(folder, adapters)
    elif embed:
        found = _compile_embedder(model, folder, request)
    else:
        found = _compile(model, adapters, request)
    with working(f"Opening {name}"):
        from qeff_ir.auto.embedding import QEFFAutoModel
        from qeff_ir.serve.opening import serve_embedder, serve_writer

        if not isinstance(found, QEFFAutoModel):
            return serve_writer(found, name, queue=queue, threads=threads)
        if adapters:
            raise RuntimeInputError("--adapter is for models that write: leave it out")
        return serve_embedder(found, name, threads)


def _open_package(folder: Path, adapters: list[tuple[str, str]]) -> QEFFAutoModelForCausalLM | QEFFAutoModel:
    from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.auto.embedding import QEFFAutoModel
    from qeff_ir.compiler import Compiled
    from qeff_ir.package import open_package
    from qeff_ir.serve.opening import writes

    if not writes(Compiled(folder, open_package(folder), cached=True)):
        found = QEFFAutoModel.from_package(folder)
        if not found.pools:
            raise PackageError(f"{folder} returns no embeddings and no logits: compile it with a pooling")
        return found
    if not adapters:
        return QEFFAutoModelForCausalLM.from_package(folder)
    return _loaded(QEffAutoPeftModelForCausalLM.from_package(folder), adapters)


def _compile_embedder(model: str, folder: Path, request: Request) -> QEFFAutoModel:
    if odd := sorted(set(request.given) - {"target", "emit_only", "batch_size"}):
        raise RuntimeInputError(f"--{odd[0].replace('_', '-')} is not for embeddings: leave it out")
    return compile_embedder(
        folder if folder.is_dir() else model, None, None, None, seq_len=[32, 128, 512],
        target=request.target, emit_only=request.emit_only, batch_size=request.batch_size,
    )  # fmt: skip


def _compile(model: str, adapters: list[tuple[str, str]], request: Request) -> QEFFAutoModelForCausalLM:
    from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM

    source = open_model(model, request)
    if "ctx_len" not in request.given:
        positions = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
        request = dataclasses.replace(request, ctx_len=min(_CTX_LEN, positions or _CTX_LEN))
    if not {"batch_size", "full_batch_size"} & set(request.given):
        request = dataclasses.replace(request, full_batch_size=_SLOTS)
    if not adapters:
        return QEFFAutoModelForCausalLM.from_package(compile_source(source, request).folder, checkpoint=source)
    (name, first), *others = adapters
    found = QEffAutoPeftModelForCausalLM.from_pretrained(
        first, name, base_model=model, trust_remote_code=request.trust_remote_code
    )
    _loaded(found, others)
    with compiling(request) as rest:
        found.compile(**request.options(), token_embedding=request.token_embedding, **rest)
    return found


def _loaded(model: QEffAutoPeftModelForCausalLM, adapters: list[tuple[str, str]]) -> QEffAutoPeftModelForCausalLM:
    for name, folder in adapters:
        model.load_adapter(folder, name)
    return model
