"""``qeff compile``: from a model to a package."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qeff_ir.cli.encoded import compile_encoded, is_encoded
from qeff_ir.cli.models import compile_source, open_model
from qeff_ir.cli.pictures import compile_pictures, size_of
from qeff_ir.cli.request import Request, with_request
from qeff_ir.cli.tables import show_programs
from qeff_ir.cli.terminal import line, seconds
from qeff_ir.errors import CompileError, PackageError
from qeff_ir.package import MAIN

if TYPE_CHECKING:
    from qeff_ir.compiler import Compiled


@with_request
def command(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the package; in the cache by default.")
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="Height and width of pictures, for a model of pictures; may be repeated.", metavar="HxW"),
    ] = None,
    encoder_ctx_len: Annotated[
        list[int] | None,
        typer.Option(help="Tokens (or positions of a recording) that an encoder takes; may be repeated.", min=1),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures that a prompt may have.", min=1)] = 1,
    single_program: Annotated[
        bool,
        typer.Option("--single-program", help="Encoder and language model in one program, for a model of pictures."),
    ] = False,
    bake_adapters: Annotated[
        list[str] | None,
        typer.Option(help="An adapter that becomes a weight of the package; may be repeated.", metavar="NAME=FOLDER"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write what the passes did (to each program) as JSON.", metavar="FILE"),
    ] = None,
    *,
    request: Request,
) -> None:
    """Compile a model into a package.

    Any other option is a flag of the AI 100 compiler, and comes after MODEL (--aic-enable-depth-first, --mos 1).
    """
    started = time.perf_counter()
    if single_program and not image_size:
        raise CompileError("--single-program is for models of pictures and text: give --image-size too")
    source = None if image_size else open_model(model, request)
    encoded = source is not None and is_encoded(source)
    if bake_adapters:
        if source is None or encoded:
            raise CompileError("--bake-adapters is for causal LMs: leave it out")
        from qeff_ir.cli.baking import with_adapters

        request = with_adapters(request, bake_adapters, source)
    if encoder_ctx_len and not encoded:
        raise CompileError("--encoder-ctx-len is for models of an encoder and a decoder: leave it out")
    if source is not None and encoded:
        compiled = compile_encoded(source, request, encoder_ctx_len or None, out).package
    elif source is not None:
        compiled = compile_source(source, request, out)
    else:
        assert image_size
        sizes = [size_of(size) for size in image_size]
        found = compile_pictures(model, request, sizes, num_images, out, single_program=single_program)
        compiled = found.package
    show_programs(compiled.manifest)
    if compiled.cached:
        line(("Nothing to do: ", "green"), "an equal package was there already.")
    else:
        line(("Compiled", "green"), f" {compiled.manifest.model} in {seconds(time.perf_counter() - started)}.")
    if report is not None:
        reports = {name: program.report for name, program in compiled.manifest.programs.items()}
        _write_report(report, reports if len(reports) > 1 else reports[MAIN])
        line("Report:   ", str(report))
    needs_model = request.token_embedding == "host"
    runs = f"{shlex.quote(model)} --token-embedding host" if needs_model else shlex.quote(str(compiled.folder))
    _say_next(compiled, f"{runs} --image FILE" if image_size else runs)


def _say_next(compiled: Compiled, runs: str) -> None:
    line("Package:  ", (str(compiled.folder), "bold"))
    linked = [path for path in (compiled.folder / "weights").glob("*") if path.stat().st_nlink > 1]
    if linked:
        size = sum(path.stat().st_size for path in linked) / 1e9
        line(f"Weights:  {size:.1f} GB are hard links, which onnx does not read; QEFF_WEIGHTS=copy copies them")
    from backends import find_backend

    emitted = find_backend(compiled.manifest.target).emitted
    if emitted and not compiled.manifest.compiled:
        line(f"          emitted, not compiled: {emitted}")
    line("Next:     ", (f'qeff run {runs} --prompt "…"', "bold"))


def _write_report(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise PackageError(
            f"the report {path} cannot be written ({error.strerror}): choose another --report"
        ) from error
