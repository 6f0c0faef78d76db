"""``qeff replay``, ``bisect`` and ``reduce``: what to do with the bundle of a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qeff_ir.cli.terminal import line, show, working

_Bundle = Annotated[Path, typer.Argument(help="The folder that a failed 'qeff opt' wrote.", show_default=False)]


def replay_command(bundle: _Bundle) -> None:
    """Run a failed pass again; exit 1 unless it fails in the same way."""
    with working("Replaying"):
        from qeff_ir.debug.bundle import read_bundle
        from qeff_ir.debug.replay import replay

        opened = read_bundle(bundle)
        same, what = replay(opened)
    for library, here, there in opened.other_versions():
        line((f"{library} is {here} here, and was {there}", "yellow"))
    show(Text(what[:1].upper() + what[1:], style="bold green" if same else "bold red"))
    raise typer.Exit(0 if same else 1)


def bisect_command(
    bundle: _Bundle,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="CMD", help="Decide by this command, run as CMD FOLDER on a saved module; not 0 means bad."
        ),
    ] = None,
) -> None:
    """Find the guilty pass, and the guilty rewrite within it."""
    with working("Bisecting") as say:
        from qeff_ir.debug.bisect import bisect
        from qeff_ir.debug.bundle import read_bundle
        from qeff_ir.debug.diff import render

        trials: list[str] = []

        def tell(text: str) -> None:
            say(text)
            trials.append(text)

        culprit = bisect(read_bundle(bundle), command=check, say=tell)
    for trial in trials:
        line((trial, "dim"))
    line(("Guilty: ", "bold"), (str(culprit), "bold red"))
    if culprit.difference is not None:
        line(("Value:  ", "bold"), str(culprit.difference))
    for text in render(culprit.change) if culprit.change is not None else ():
        line(f"  {text}")


def reduce_command(
    bundle: _Bundle,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the smaller bundle; beside it by default.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Most modules to try.", min=1)] = 400,
) -> None:
    """Shrink the module of a bundle while it still fails in the same way."""
    with working("Reducing") as say:
        from qeff_ir.debug.bundle import read_bundle
        from qeff_ir.debug.reduce import PASSING, reduce, write_reduction

        opened = read_bundle(bundle)
        found = reduce(opened, say=say, trials=trials)
        written = write_reduction(opened, found, out or bundle.with_name(f"{bundle.name}-reduced"))
    before, after = found.nodes
    show(f"{before} → {after} nodes after {found.trials} trials; it still fails in the same way.")
    line("Bundle:  ", (str(written), "bold"))
    if found.passing is not None:
        line("Passing: ", f"{written / PASSING}, the nearest module that passes ({len(found.passing.graph)} nodes)")
