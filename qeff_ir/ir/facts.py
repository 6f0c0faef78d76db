"""Dataclasses as plain JSON data, and back: written by their fields, and read against them.

Facts come with files from anywhere, so that nothing of them is believed: types are those of the fields, whole numbers
are sizes or indices that a tensor can have, texts fit one line, no field is missing, and none is unknown.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import onnx_ir as ir

from qeff_ir.errors import VerificationError

MAX_SIZE = 2**31 - 1
"""The largest size of an axis, and the largest of all whole numbers in facts."""

_MAX_TEXT = 1024
_FROM_ZERO = frozenset({"layer", "index", "fill"})
"""Fields that count from 0, tokens too; the other whole numbers are sizes."""
_TYPES = frozenset(t.name for t in ir.DataType) - {"UNDEFINED", "STRING"}
"""Element types of numbers."""

T = TypeVar("T")


def dump(value: Any) -> Any:
    """A dataclass of facts, or a part of one, as plain JSON data."""
    if dataclasses.is_dataclass(value):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ir.DataType):
        return value.name
    if isinstance(value, tuple):
        return [dump(item) for item in cast("tuple[Any, ...]", value)]
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value


def read(cls: type[T], data: object, what: str) -> T:
    """The dataclass that plain JSON data describe.

    Args:
        cls: A dataclass whose fields are whole numbers, texts, truth values, element types, literals, unions of them,
            mappings of texts to such, other such dataclasses, or tuples of any of these.
        data: The data.
        what: What they are, for the message.

    Raises:
        VerificationError: They are not of the fields' types, or a field is missing or unknown (code ``facts``).
    """
    if not isinstance(data, dict):
        raise damaged(f"{what} is {_short(data)}, not an object")
    given, hints = cast("dict[str, object]", data), typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast("Any", cls))}
    for name in sorted({*given, *fields}):
        if name not in fields:
            raise damaged(f"{what} has the unknown field {_short(name)}")
        if name not in given and fields[name].default is dataclasses.MISSING:
            raise damaged(f"{what} has no {name}")
    return cls(**{n: _value(hints[n], v, f"{n} of {what}", 0 if n in _FROM_ZERO else 1) for n, v in given.items()})


def damaged(sentence: str) -> VerificationError:
    """The error for facts that cannot be read."""
    return VerificationError("facts", f"the module's facts are damaged ({sentence}): lower the model again")


def _value(hint: Any, data: object, what: str, least: int) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [part for part in parts if type(data) is part]
        return _value(fitting[0] if fitting else parts[0], data, what, least)
    if dataclasses.is_dataclass(hint):
        return read(cast("type[Any]", hint), data, what)
    if origin is tuple and isinstance(data, list):
        items = enumerate(cast("list[object]", data))
        return tuple(_value(parts[0], item, f"number {i} of the {what}", least) for i, item in items)
    if origin is Mapping and isinstance(data, dict):
        pairs = cast("dict[str, object]", data).items()
        return {
            _value(str, k, f"key of the {what}", 0): _value(parts[1], v, f"{k} of the {what}", least) for k, v in pairs
        }
    if hint is ir.DataType and isinstance(data, str) and data in _TYPES:
        return ir.DataType[data]
    if not _is(hint, data, least):
        raise damaged(f"the {what} is {_short(data)}")
    return data


def _is(hint: Any, data: object, least: int) -> bool:
    if typing.get_origin(hint) is Literal:
        return isinstance(data, str) and data in typing.get_args(hint)
    if type(data) is not hint:
        return hint is type(None) and data is None
    if isinstance(data, str):
        return data.isprintable() and 0 < len(data) <= _MAX_TEXT
    return not isinstance(data, int) or isinstance(data, bool) or least <= data <= MAX_SIZE


def _short(data: object) -> str:
    if isinstance(data, list | dict):
        return "a list" if isinstance(data, list) else "an object"
    shown = ascii(data)
    return shown if len(shown) <= 60 else f"{shown[:50]}…"
