"""``qeff opt``: run passes over a model, a saved module or a plain ONNX file, and look at what they do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qeff_ir.cli.models import open_model
from qeff_ir.cli.request import Request
from qeff_ir.cli.tables import pipeline_table
from qeff_ir.cli.terminal import line, show, working
from qeff_ir.errors import CompileError, PackageError, PassError, PipelineError

if TYPE_CHECKING:
    from qeff_ir.ir.module import Module
    from qeff_ir.passing.instrument import Instrument, Moment
    from qeff_ir.passing.pipeline import Pipeline

_PRINT = "Looking"
_SHAPES = "Shapes"
_NUMERIC = 4
_Names = Annotated[
    list[str] | None, typer.Option(metavar="PASS", help="Print the module there.", rich_help_panel=_PRINT)
]
_Size = Annotated[int | None, typer.Option(min=1, rich_help_panel=_SHAPES, show_default=False)]


def command(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, saved module or ONNX file.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="The passes, as text.", metavar="TEXT")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder or .onnx file for the result.")] = None,
    check: Annotated[
        int, typer.Option(min=0, max=4, help="0 nothing, 1 structure, …, 4 also the numbers after every pass.")
    ] = 1,
    print_before: _Names = None,
    print_after: _Names = None,
    print_changed: Annotated[
        bool, typer.Option("--print-changed", help="Print after each change.", rich_help_panel=_PRINT)
    ] = False,
    print_failed: Annotated[
        bool, typer.Option("--print-failed", help="Print what a failing pass was given.", rich_help_panel=_PRINT)
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print changes and failures, and dump, only there.", rich_help_panel=_PRINT),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="A numbered folder of all stages.", metavar="DIR", rich_help_panel=_PRINT)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="What the passes did: .json or .html.", metavar="FILE", rich_help_panel=_PRINT)
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Where a failure goes; in the cache by default.", metavar="DIR")
    ] = None,
    prefill_seq_len: _Size = None,
    ctx_len: _Size = None,
    batch_size: _Size = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
) -> None:
    """Run passes and look at what they do; a failure leaves a bundle for replay, bisect and reduce."""
    if report is not None and report.suffix not in (".json", ".html"):
        raise PackageError(f"the report {report} is neither .json nor .html: choose one of them")
    given: dict[str, int | None] = {"prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len, "batch_size": batch_size}
    with working(f"Opening {model}") as say:
        from qeff_ir.debug.capture import Capture
        from qeff_ir.debug.recorder import Recorder
        from qeff_ir.passing.instrument import Watch
        from qeff_ir.passing.manager import run_pipeline
        from qeff_ir.passing.pipeline import Pipeline

        steps = Pipeline.parse(pipeline)
        flags: dict[Moment, bool] = {"changed": print_changed, "failed": print_failed}
        moments: list[Moment] = [moment for moment, wanted in flags.items() if wanted]
        looking = _printers(steps, print_before, print_after, moments, only, dump)
        module = _open(model, trust_remote_code)
        _specialize(module, {name: size for name, size in given.items() if size is not None})
        capture, recorder = Capture(bundle, check=check), Recorder()
        stack = [*looking, *_numeric(check), recorder, capture, Watch(lambda id, _: say(f"Running the pass {id}"))]
        try:
            run_pipeline(module, steps, instruments=stack, check=check)
        except Exception as error:
            if report is not None and recorder.data:
                recorder.data["failed"]["bundle"] = str(capture.written) if capture.written is not None else None
                write_report(report, recorder.data)
            if capture.written is None:
                raise
            what = str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
            more = "\n  next" if "\n" in what else "; next"  # the first line stays one sentence
            raise PassError(f"{what}{more}: qeff bisect {shlex.quote(str(capture.written))}") from error
    show(pipeline_table(recorder.data))
    if out is not None:
        from qeff_ir.ir.snapshot import write_module

        line("Result:  ", (str(write_module(module, out)), "bold"))
    if report is not None:
        write_report(report, recorder.data)
        line("Report:  ", (str(report), "bold"))


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write a report as JSON or, by the file's ending, as HTML.

    Raises:
        PackageError: The file cannot be written.
    """
    from qeff_ir.debug.report_html import to_html

    text = to_html(data) if path.suffix == ".html" else json.dumps(data, indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PackageError(f"the report {path} cannot be written ({error.strerror}): choose another file") from error


def _open(text: str, trust_remote_code: bool) -> Module:
    from qeff_ir.debug.plain import load_onnx, onnx_file

    path = onnx_file(text)
    return load_onnx(path) if path else open_model(text, Request(trust_remote_code=trust_remote_code)).lower()


def _specialize(module: Module, given: dict[str, Any]) -> None:
    """Set the shapes of a decoder that has none yet, or those that the user asks for."""
    from backends.options import CompileOptions, completed
    from qeff_ir.specialize import specialize

    if not module.states:
        if given:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise CompileError(f"{module.name} has no states, so that {option} means nothing: leave it out")
        return
    if given and "ctx_len" not in module.dims:
        raise CompileError(f"the caches of {module.name} have their sizes already: give the module before kv-retention")
    if given or not module.specializations:
        specialize(module, CompileOptions(**completed(given)))


def _numeric(check: int) -> list[Instrument]:
    from qeff_ir.debug.equivalence import Equivalence

    return [Equivalence()] if check >= _NUMERIC else []


def _printers(
    steps: Pipeline,
    before: list[str] | None,
    after: list[str] | None,
    moments: list[Moment],
    only: list[str] | None,
    dump: Path | None,
) -> list[Instrument]:
    from qeff_ir.passing.instrument import Dump, PrintIR
    from qeff_ir.passing.pipeline import nearest

    known = {name: None for id, item in steps for name in (id, item.name)}
    for name in (*(before or ()), *(after or ()), *(only or ())):
        if name not in known:
            raise PipelineError(f"the pipeline has no pass '{name}' to look at; {nearest(name, known)}")
    found: list[Instrument] = []
    found += [PrintIR(("before",), before)] if before else []
    found += [PrintIR(("after",), after)] if after else []
    found += [PrintIR(moments, only)] if moments else []
    return found + ([Dump(dump, only)] if dump is not None else [])
