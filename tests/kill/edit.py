"""Edits of source code that follow it where it goes: in a function, in the place of a piece of its syntax tree.

A function is named by the end of its dotted path (``attention._grouped``, ``onnxruntime.session.OrtSession.run``), as
much of it as tells it from all others, so that a file may move. What stands there is compared as syntax: layout, quotes
and comments do not count.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("qeff_ir", "passes", "backends")
"""Folders that faults are planted in."""

_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class EditError(Exception):
    """A place or what should stand there is not in the source, or stands there more than once."""


@dataclass(frozen=True)
class Place:
    """A module, class or function of the source.

    Attributes:
        file: Path of its file, relative to the root.
        inner: Names of the classes and functions around it and its own, outermost first; empty for a module.
    """

    file: Path
    inner: tuple[str, ...]


@functools.cache
def places(root: Path) -> dict[str, Place]:
    """Every module, class and function below a root by its whole dotted path."""
    found: dict[str, Place] = {}
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root)
            module = ".".join(file.with_suffix("").parts)
            for inner, _ in _scopes(ast.parse(path.read_text())):
                found[".".join([module, *inner])] = Place(file, inner)
    return found


def find(root: Path, where: str) -> Place:
    """The place of that name.

    Raises:
        EditError: There is none, or there are several.
    """
    known = places(root)
    found = [place for name, place in known.items() if f".{name}".endswith(f".{where}")]
    if len(found) != 1:
        raise EditError(f"'{where}' names {len(found)} places in the source, not one")
    return found[0]


def replaced(text: str, inner: tuple[str, ...], old: str, new: str) -> str:
    """Source code with `new` in the place of `old`, which stands just once in one of its scopes.

    Args:
        text: The source of a module.
        inner: The scope, see `Place`.
        old: An expression, or some statements in a row.
        new: What takes its place; statements may be none (``pass``).

    Raises:
        EditError: It stands there not once, or `new` is the same.
    """
    tree = ast.parse(text)
    scope = next(node for names, node in _scopes(tree) if names == inner)
    before, after = _parsed(old), _parsed(new)
    if isinstance(before, ast.expr) != isinstance(after, ast.expr):
        before, after = ast.parse(_dedent(old)).body, ast.parse(_dedent(new)).body
    if _dump(before) == _dump(after):
        raise EditError("what is put there is what stands there")
    spots = _spots(scope, before)
    if len(spots) != 1:
        raise EditError(f"'{old}' stands {len(spots)} times in '{'.'.join(inner) or 'the module'}', not once")
    node, field, start, count = spots[0]
    if count is None:
        setattr(node, field, after)
    else:
        getattr(node, field)[start : start + count] = after if isinstance(after, list) else [after]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _scopes(tree: ast.Module) -> list[tuple[tuple[str, ...], _Scope]]:
    found: list[tuple[tuple[str, ...], _Scope]] = [((), tree)]

    def look(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(((*names, child.name), child))
                look(child, (*names, child.name))
            elif isinstance(child, ast.stmt):
                look(child, names)

    look(tree, ())
    return found


def _parsed(text: str) -> ast.expr | list[ast.stmt]:
    body = ast.parse(_dedent(text)).body
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else body


def _dedent(text: str) -> str:
    lines = text.strip("\n").splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] if not line[:margin].strip() else line for line in lines)


def _dump(what: ast.AST | list[ast.stmt]) -> str:
    return "\n".join(map(ast.dump, what)) if isinstance(what, list) else ast.dump(what)


def _spots(scope: ast.AST, what: ast.expr | list[ast.stmt]) -> list[tuple[ast.AST, str, int, int | None]]:
    """Where it stands: the node above it, the field there, and for a list the first entry and how many."""
    wanted, found = _dump(what), list[tuple[ast.AST, str, int, int | None]]()
    for node in ast.walk(scope):
        for field, value in ast.iter_fields(node):
            if isinstance(what, list):
                if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                    size = len(what)
                    starts = range(len(value) - size + 1)
                    found += [(node, field, i, size) for i in starts if _dump(value[i : i + size]) == wanted]
            elif isinstance(value, ast.expr) and ast.dump(value) == wanted:
                found.append((node, field, 0, None))
            elif isinstance(value, list):
                entries = enumerate(value)
                found += [(node, field, i, 1) for i, v in entries if isinstance(v, ast.expr) and ast.dump(v) == wanted]
    return found
