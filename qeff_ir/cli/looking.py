"""``qeff diff`` and ``qeff view``: look at modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_ir.cli.terminal import line, working
from qeff_ir.errors import ModelLoadError, PackageError

if TYPE_CHECKING:
    from qeff_ir.ir.module import Module

_STYLES = {"+": "green", "-": "red", "~": "yellow"}
_File = Annotated[str, typer.Argument(help="A saved module or an ONNX file.", show_default=False)]


def diff_command(
    before: _File,
    after: _File,
    limit: Annotated[int, typer.Option(help="Nodes listed for each pass and module.", min=0)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data, all of it.")] = False,
) -> None:
    """Show what differs between two modules: nodes, interface, states, weights; exit 1 if anything does."""
    with working("Comparing"):
        from qeff_ir.debug.diff import diff, render

        found = diff(_load(before), _load(after))
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        for text in render(found, limit=limit):
            line((text, _STYLES.get(text.lstrip()[:1], "")))
    raise typer.Exit(1 if found else 0)


def view_command(
    snapshot: _File, port: Annotated[int, typer.Option(help="Of the local page.", min=0, max=65535)] = 0
) -> None:
    """Open a saved module in Netron, which runs on this machine only."""
    path = _onnx(snapshot)
    try:
        import netron  # pyright: ignore[reportMissingImports]  # an optional dependency
    except ImportError as error:
        raise PackageError(f"Netron is not installed, so {path} cannot be shown: pip install netron") from error
    line("Showing ", (str(path), "bold"), (" (stop with Ctrl-C)", "dim"))
    netron.start(str(path), address=("localhost", port) if port else None)
    netron.wait()


def _onnx(text: str) -> Path:
    from qeff_ir.debug.plain import onnx_file

    path = onnx_file(text)
    if path is None or not path.is_file():
        raise ModelLoadError(f"{text} is no saved module and no ONNX file: 'qeff opt MODEL -p \"…\" -o OUT' writes one")
    return path


def _load(text: str) -> Module:
    from qeff_ir.debug.plain import load_onnx

    return load_onnx(_onnx(text))
