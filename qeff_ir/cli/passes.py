"""``qeff passes``: every pass with its options, read from the registry."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from qeff_ir.cli.tables import grid
from qeff_ir.cli.terminal import show, working
from qeff_ir.errors import PipelineError

if TYPE_CHECKING:
    from qeff_ir.passing.base import Pass


def command(
    explain: Annotated[str | None, typer.Option(help="All about one pass.", metavar="NAME")] = None,
) -> None:
    """List the passes that a pipeline can name, with their options."""
    with working("Loading the passes"):
        from qeff_ir.passing.base import registered_passes
        from qeff_ir.passing.pipeline import nearest

        known = registered_passes()
    if explain is not None and explain not in known:
        raise PipelineError(f"there is no pass '{explain}'; {nearest(explain, known)}")
    if explain is not None:
        _describe(known[explain], whole=True)
        return
    for cls in known.values():
        _describe(cls)
    show('A pipeline is text: qeff compile MODEL --pipeline "canonicalize,kv-retention{layout=scatter ring=off}"')


def _describe(cls: type[Pass], *, whole: bool = False) -> None:
    """Print a pass: its name, its docstring or the first sentence of it, its options, and its properties."""
    from qeff_ir.passing.pipeline import options

    text = inspect.getdoc(cls) or ""
    show(Text(cls.name, style="bold cyan"))
    for index, paragraph in enumerate(text.split("\n\n") if whole else [text.partition("\n\n")[0]]):
        if index:
            show()
        _indented(" ".join(paragraph.split()))
    table = grid("option", "values", "default", "meaning")
    for option in options(cls).values():
        default = "required" if option.default is dataclasses.MISSING else _spelled(option.default)
        table.add_row(option.name, option.values, default, option.help)
    if table.row_count:
        _indented(table)
    for verb, properties in _properties(cls):
        _indented(Text(f"{verb} {', '.join(sorted(properties))}", style="dim"))
    show()


def _indented(what: RenderableType) -> None:
    show(Padding(what, (0, 0, 0, 2), expand=False))


def _properties(cls: type[Pass]) -> list[tuple[str, frozenset[str]]]:
    found = [("requires", cls.requires), ("establishes", cls.establishes), ("invalidates", cls.invalidates)]
    return [(verb, properties) for verb, properties in found if properties]


def _spelled(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
