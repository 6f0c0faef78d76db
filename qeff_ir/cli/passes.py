"""``qeff passes``: every pass with its options, and a page of reference for each, read from the passes themselves."""

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
        from qeff_ir.passing.base import broken_plugins, registered_passes
        from qeff_ir.passing.pipeline import nearest

        known, broken = registered_passes(), broken_plugins()
    if explain is not None and explain not in known:
        raise PipelineError(f"there is no pass '{explain}'; {nearest(explain, known)}")
    if explain is not None:
        _describe(known[explain], whole=True)
        return
    for cls in known.values():
        _describe(cls)
    for name in broken:
        show(Text(f"{name}: this plugin cannot be imported", style="yellow"))
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
    if whole:
        for fact in _facts(cls):
            _indented(Text(fact, style="dim"))
    show()


def _indented(what: RenderableType) -> None:
    show(Padding(what, (0, 0, 0, 2), expand=False))


def _properties(cls: type[Pass]) -> list[tuple[str, frozenset[str]]]:
    found = [("requires", cls.requires), ("establishes", cls.establishes), ("invalidates", cls.invalidates)]
    return [(verb, properties) for verb, properties in found if properties]


def _facts(cls: type[Pass]) -> list[str]:
    """What the manager holds the pass to, beyond the order of pipelines: a line each."""
    from qeff_ir.passing.base import Pass
    from qeff_ir.passing.properties import PROPERTIES

    facts: list[str] = []
    if cls.sites is not Pass.sites:
        facts.append(f"looks at: {' '.join((inspect.getdoc(cls.sites) or '').split())}")
    facts.append(f"phase: {cls.phase}")
    facts.append(f"must fire: {cls.expect}")
    claims = {"interface": cls.changes_interface, "weights": cls.changes_weights}
    changed = [name for name, may in claims.items() if may]
    facts.append(f"may change: {' and '.join(['the graph', *changed])}")
    if cls.idempotent:
        facts.append("a second run changes nothing")
    named = cls.requires | cls.establishes | cls.invalidates
    facts += [f"{name}: {PROPERTIES[name].meaning}" for name in sorted(named) if name in PROPERTIES]
    home = inspect.getmodule(cls)
    facts.append(f"from {cls.__module__}" + (f" ({home.__file__})" if home is not None else ""))
    return facts


def _spelled(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
