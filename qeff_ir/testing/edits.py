"""Edits of source code: in a function, in the place of a piece of its syntax tree.

What stands there is compared as syntax: layout, quotes and comments do not count.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from qeff_ir.errors import QeffError

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class EditError(QeffError):
    """What should stand in a place of the source is not there, or stands there more than once."""


@contextmanager
def planted(function: Callable[..., Any], old: str, new: str) -> Generator[None]:
    """Plant a fault in a function of this process: as long as the block lasts, `new` stands in the place of `old`.

    Whoever holds the function runs the edited one, methods of objects that exist already too.

    Args:
        function: A function or method that is written in Python.
        old: An expression, or some statements in a row, that stand there just once; compared as syntax.
        new: What takes its place.

    Raises:
        EditError: The function has no source, `old` stands there not once, or the edit uses variables of the functions
            around it that the function does not.
    """
    target = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(target, FunctionType):
        raise EditError(f"{function!r} is not a function that is written in Python: no fault can be planted in it")
    try:
        text = textwrap.dedent(inspect.getsource(target))
    except (OSError, TypeError) as error:
        raise EditError(f"{target.__qualname__} has no source, in which a fault could be planted") from error
    real, edited = target.__code__, _compiled(replaced(text, (target.__name__,), old, new), target.__code__)
    if edited.co_freevars != real.co_freevars:
        raise EditError(f"the edit of {target.__qualname__} uses other variables of the functions around it")
    target.__code__ = edited
    try:
        yield
    finally:
        target.__code__ = real


def _compiled(text: str, like: CodeType) -> CodeType:
    """The code of a function, below one that has the variables around it."""
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    function.decorator_list = []
    around = ast.parse(f"def around({', '.join(like.co_freevars)}): pass")
    assert isinstance(around.body[0], ast.FunctionDef)
    around.body[0].body = [function]
    future = like.co_flags & __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(around), like.co_filename, "exec", flags=future, dont_inherit=True)
    for _ in range(2):  # the module, and what is around
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


def replaced(text: str, inner: tuple[str, ...], old: str, new: str) -> str:
    """Source code with `new` in the place of `old`, which stands just once in one of its scopes.

    Args:
        text: The source of a module.
        inner: Names of the classes and functions around the scope and its own, outermost first; empty for the module.
        old: An expression, or some statements in a row.
        new: What takes its place; statements may be none (``pass``).

    Raises:
        EditError: It stands there not once, or `new` is the same.
    """
    tree = ast.parse(text)
    scope = next(node for names, node in scopes(tree) if names == inner)
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


def scopes(tree: ast.Module) -> list[tuple[tuple[str, ...], Scope]]:
    """Every scope with the names of the classes and functions around it and its own, the module itself first."""
    found: list[tuple[tuple[str, ...], Scope]] = [((), tree)]

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
