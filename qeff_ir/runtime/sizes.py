"""Sizes that a model computes, as text: ``(seq_len - 10)//5 + 1``, evaluated without running any code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"Max": max, "Min": min, "Mod": operator.mod, "PythonMod": operator.mod}


def evaluate(expression: str, symbols: Mapping[str, int]) -> int:
    """The size that an expression of symbols, whole numbers, ``+ - * // %``, ``Max`` and ``Min`` stands for.

    Raises:
        ValueError: It is anything else, or divides by zero.
    """
    try:
        return _value(ast.parse(expression, mode="eval").body, symbols)
    except (SyntaxError, KeyError, ZeroDivisionError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression[:80]!r} is not a size") from error


def _value(node: ast.expr, symbols: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, symbols)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, symbols), _value(right, symbols))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            values: Any = [_value(a, symbols) for a in args]
            return _FUNCTIONS[name](*values)
        case _:
            raise ValueError(f"{ast.unparse(node)[:80]!r} is not a size")
