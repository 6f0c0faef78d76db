"""The application: its commands, and how each way of failing looks from outside."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import qeff_ir.cli.bundles as bundles
import qeff_ir.cli.compile as compiling
import qeff_ir.cli.cost as cost
import qeff_ir.cli.demo as demo
import qeff_ir.cli.embed as embed
import qeff_ir.cli.looking as looking
import qeff_ir.cli.opt as opt
import qeff_ir.cli.passes as passes
import qeff_ir.cli.run as run
import qeff_ir.cli.serve as serve
import qeff_ir.cli.terminal as terminal
import qeff_ir.cli.verify as verify
from qeff_ir import __version__
from qeff_ir.cli.flags import FlagCommand
from qeff_ir.errors import QeffError

_EXIT_USAGE = 2
_EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h
_EXIT_INTERRUPT = 130

app = typer.Typer(
    name="qeff",
    help="Compile any Hugging Face causal LM for Qualcomm Cloud AI 100, and run it on any CPU.",
    epilog="New here? [bold]qeff demo[/bold] shows all of it in a minute.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile", cls=FlagCommand)(compiling.command)
app.command("run", cls=FlagCommand)(run.command)
app.command("embed")(embed.command)
app.command("serve", cls=FlagCommand)(serve.command)
app.command("verify", cls=FlagCommand)(verify.command)
app.command("cost")(cost.command)
app.command("opt")(opt.command)
app.command("diff")(looking.diff_command)
app.command("view")(looking.view_command)
app.command("replay")(bundles.replay_command)
app.command("bisect")(bundles.bisect_command)
app.command("reduce")(bundles.reduce_command)
app.command("passes")(passes.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qeff-ir {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, anywhere in a command.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``qeff``; those of the process by default.

    Returns:
        The exit code: 0, 1 when a comparison failed, 2 for bad input, 70 for a defect of qeff-ir, 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    # Anywhere: a user adds it at the end of the command that failed. Without a command, help is what is wanted.
    words = [w for w in words if w != "--debug"] or ["--help"]
    terminal.write_any_text()
    with terminal.interrupts() as interrupted:
        try:
            with terminal.quiet():
                code: int | None = app(words, prog_name="qeff", standalone_mode=False)
            return code or 0
        except KeyboardInterrupt:
            return _EXIT_INTERRUPT
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail once more
            return 0
        except Exception as error:
            if debug:
                traceback.print_exc()
            if interrupted():  # a library has answered the interrupt with an exception of its own
                return _EXIT_INTERRUPT
            code, message = _explain(error)
    terminal.complain(message)
    return code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of whatever ended a command."""
    if isinstance(error, QeffError):
        return _EXIT_USAGE, str(error)
    if isinstance(error, OSError) and error.strerror:  # what the machine answers is not a defect
        where = "the system" if error.filename is None else str(error.filename)
        return _EXIT_USAGE, f"{where} cannot be used ({error.strerror}): see that it can be read and written"
    if isinstance(error, MemoryError):
        return _EXIT_USAGE, "there is not enough memory for this: use a smaller model, --ctx-len or --batch-size"
    usage = _usage(error)
    if usage is not None:
        return _EXIT_USAGE, usage
    what = f"{type(error).__name__}: {_first_line(error)}"
    return _EXIT_DEFECT, f"this is a defect of qeff-ir ({what}): report it with what --debug shows"


def _usage(error: Exception) -> str | None:
    """The message of a usage error, with the way to the command's help; `None` for any other exception.

    Known by its method: typer has had these classes in three places.
    """
    if not hasattr(error, "format_message"):
        return None
    any_error: Any = error
    context: Any = getattr(error, "ctx", None)
    message = " ".join(str(any_error.format_message()).split()).removeprefix("Invalid value: ").rstrip(".")
    path = "qeff" if context is None else context.command_path
    return f"{message[:1].lower()}{message[1:]} (see {path} --help)"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
