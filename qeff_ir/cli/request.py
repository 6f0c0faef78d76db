"""What to compile for: the options that `compile`, `run` and `verify` share, declared once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar

import typer

from backends import option_types
from backends.options import CompileOptions
from qeff_ir.cli.flags import flags_of
from qeff_ir.errors import PipelineError

R = TypeVar("R")

_SHAPES = "Shapes"
_TARGET = "Target"


@dataclass(frozen=True)
class Request:
    """The shared options; each field is one option of the command line.

    Attributes:
        settings: What the user gave of the targets' own options, and flags of their compilers, by Python names.
        given: Names of the fields that the user set.
    """

    target: Annotated[
        str,
        typer.Option(help="A target, or auto: AI 100 where its SDK is, else ONNX Runtime.", rich_help_panel=_TARGET),
    ] = "auto"
    emit_only: Annotated[
        bool,
        typer.Option(
            "--emit-only",
            help="Stop before the AI 100 compiler; the emulator runs the package.",
            rich_help_panel=_TARGET,
        ),
    ] = False
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Passes to run instead of the target's own; +pass and -pass edit those.",
            metavar="TEXT",
            rich_help_panel=_TARGET,
        ),
    ] = None
    token_embedding: Annotated[
        Literal["graph", "host"],
        typer.Option(
            help="Who looks up the vectors of the tokens: host leaves their table out of the package.",
            rich_help_panel=_TARGET,
        ),
    ] = "graph"
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let code that comes with the model run.", rich_help_panel=_TARGET),
    ] = False
    prefill_seq_len: Annotated[
        int,
        typer.Option(help="Tokens of a prompt in one prefill run.", min=1, rich_help_panel=_SHAPES),
    ] = 32
    ctx_len: Annotated[int, typer.Option(help="Prompt and new tokens together.", min=1, rich_help_panel=_SHAPES)] = 128
    batch_size: Annotated[int, typer.Option(help="Prompts in one run.", min=1, rich_help_panel=_SHAPES)] = 1
    full_batch_size: Annotated[
        int | None,
        typer.Option(help="Requests at once, which come and go (continuous batching).", min=1, rich_help_panel=_SHAPES),
    ] = None
    kv_cache_batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of the caches then; as many by default.", min=1, rich_help_panel=_SHAPES),
    ] = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The shapes and the target's options, by name (see `qeff_ir.compiler.compile_model`)."""
        from qeff_ir.auto.compile_arguments import compiler_flags

        chunk = self.prefill_seq_len if "prefill_seq_len" in self.given else None
        shapes = {"prefill_seq_len": chunk, "ctx_len": self.ctx_len, "batch_size": self.batch_size}
        rows = {"full_batch_size": self.full_batch_size, "kv_cache_batch_size": self.kv_cache_batch_size}
        return shapes | compiler_flags({**rows, **self.settings})


def _of_targets() -> list[inspect.Parameter]:
    """One command-line option for each option with a line of help; of those that all targets have, one."""
    shared = {f.name for f in fields(CompileOptions)}
    found: dict[str, inspect.Parameter] = {}
    for kind in (CompileOptions, *option_types()):
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            if "help" not in item.metadata or (item.name in shared and kind is not CompileOptions):
                continue
            hint, several = hints[item.name], typing.get_origin(hints[item.name]) is tuple
            own = item.metadata.get("flag", f"--{item.name.replace('_', '-')}")
            flag = (own,) if hint is bool or "flag" in item.metadata else ()
            least = item.metadata.get("least", 1) if hint is int or several else None
            told = f"{item.metadata['help']} May be repeated." if several else item.metadata["help"]
            option = typer.Option(*flag, help=told, min=least, rich_help_panel=kind.title or _TARGET)
            annotation = Annotated[list[int] | None if several else hint, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            if item.name in found or item.name in {f.name for f in fields(Request)}:
                raise PipelineError(f"two options of the command line are named '{item.name}': rename that of a target")
            default = None if several else item.default
            found[item.name] = inspect.Parameter(item.name, keyword, default=default, annotation=annotation)
    return list(found.values())


_HIDDEN = ("settings", "given")


def with_request(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command, whose keyword `request` takes a `Request`, one command-line option for each field of it."""
    hints = typing.get_type_hints(Request, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Request)
        if f.name not in _HIDDEN
    ]
    of_targets = _of_targets()
    names = [p.name for p in shared]
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "request"]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> R:
        chosen = {name: values.pop(name) for name in names}
        own = {p.name: values.pop(p.name) for p in of_targets}
        sources = {name: context.get_parameter_source(name) for name in (*names, *own)}
        given = [name for name, where in sources.items() if where is not None and where.name != "DEFAULT"]
        settings = {name: value for name, value in own.items() if name in given} | dict(flags_of(context))
        request = Request(**chosen, settings=settings, given=(*given, *flags_of(context)))
        return command(**values, request=request)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared + of_targets + [context]
    wrapped.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
