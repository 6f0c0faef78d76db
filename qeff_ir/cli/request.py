"""What to compile for: the options that `compile`, `run` and `verify` share, declared once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from qeff_ir.cli.flags import flags_of

if TYPE_CHECKING:
    from backends.base import CompileOptions

R = TypeVar("R")

_SHAPES = "Shapes"
_TARGET = "Target"
_AI100 = "Cloud AI 100"


@dataclass(frozen=True)
class Request:
    """The shared options; each field is one option of the command line.

    Attributes:
        flags: Compiler flags, by their Python names.
        given: Names of the fields that the user set.
    """

    target: Annotated[
        str,
        typer.Option(
            help="auto (AI 100 where its SDK is, else ONNX Runtime), onnxruntime or ai100.", rich_help_panel=_TARGET
        ),
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
    num_cores: Annotated[int, typer.Option(help="Cores of the device.", min=1, rich_help_panel=_AI100)] = 16
    num_devices: Annotated[int, typer.Option(help="Devices that share the model.", min=1, rich_help_panel=_AI100)] = 1
    mxfp6_matmul: Annotated[
        bool, typer.Option("--mxfp6-matmul", help="Compress the weights.", rich_help_panel=_AI100)
    ] = False
    mxint8_kv_cache: Annotated[
        bool, typer.Option("--mxint8-kv-cache", help="Compress the KV cache.", rich_help_panel=_AI100)
    ] = False
    weight_free: Annotated[
        bool,
        typer.Option(
            "--weight-free", help="Let the AI 100 compiler read weights from safetensors.", rich_help_panel=_AI100
        ),
    ] = False
    force_flags: Annotated[
        bool,
        typer.Option(
            "--force-flags", help="Hand unknown compiler flags on instead of refusing them.", rich_help_panel=_AI100
        ),
    ] = False
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: tuple[str, ...] = ()

    def options(self) -> CompileOptions:
        """The part that a backend sees."""
        from backends.base import CompileOptions, default_prefill
        from qeff_ir.auto.compile_arguments import compiler_flags

        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(CompileOptions) if f.name in own}
        if "prefill_seq_len" not in self.given:
            shared["prefill_seq_len"] = default_prefill(self.ctx_len)
        shared["flags"] = compiler_flags(self.flags)
        return CompileOptions(**shared)


_HIDDEN = ("flags", "given")


def with_request(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command, whose keyword `request` takes a `Request`, one command-line option for each field of it."""
    hints = typing.get_type_hints(Request, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Request)
        if f.name not in _HIDDEN
    ]
    names = [p.name for p in shared]
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "request"]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> R:
        chosen = {name: values.pop(name) for name in names}
        given = [n for n in names if (where := context.get_parameter_source(n)) is not None and where.name != "DEFAULT"]
        request = Request(**chosen, flags=flags_of(context), given=(*given, *flags_of(context)))
        return command(**values, request=request)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared + [context]
    wrapped.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
