"""Damage to bytes, JSON and protobuf messages, drawn by hypothesis; most of it keeps the form, so that parsers pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_TEXTS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "/dev/zero", "-o", "a\0b", "\ud800", "x" * 300, "x" * 5000, "é", "NaN",
    "float32", "none", "null", "gelu", "yarn", "model.onnx", "weights/../../x", "{}", "[", "%s", "${HOME}", "*",
)  # fmt: skip
_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    63,
    64,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
)
_REALS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))

JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    *_NUMBERS,
    *(-n for n in _NUMBERS[3:]),
    *_REALS,
    *_TEXTS,
    [],
    {},
    [[]],
    [{}],
)
"""Values of any type that a reader may meet where it expects another."""


def junk(draw: Draw, values: tuple[Any, ...] = JUNK) -> Any:
    """One of the values, as a copy: a list that a later change fills would otherwise stay filled for every input."""
    value = draw(st.sampled_from(values))
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


_DEEP = (50, 99, 101, 500, 5000)


def damaged_json(draw: Draw, value: Any, words: tuple[str, ...] = ()) -> bytes:
    """A JSON text like `value`: entries removed, renamed, of another type or size, nested; at times not JSON at all.

    Args:
        draw: Draws from a strategy.
        value: The sound value.
        words: Keys and texts that mean something to the reader.
    """
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value, words)
    text = _text(draw, value)
    return damaged_bytes(draw, text) if draw(st.integers(0, 9)) == 0 else text


def _text(draw: Draw, value: Any) -> bytes:
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    kind = draw(st.integers(0, 29))
    if kind == 0:
        depth = draw(st.sampled_from(_DEEP))
        return b'{"a":' * depth + text + b"}" * depth
    if kind == 1:
        return text[: draw(st.integers(0, len(text)))]
    return text


def _changed(draw: Draw, value: Any, words: tuple[str, ...]) -> Any:
    holders = [h for h in _holders(value) if h]
    if not holders or draw(st.integers(0, 49)) == 0:
        return junk(draw)
    holder = draw(st.sampled_from(holders))
    key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    match draw(st.integers(0, 6)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            name = draw(st.sampled_from([*words, *_TEXTS]) if words else st.sampled_from(_TEXTS))
            holder[name] = holder.pop(key)
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 2 if words:
            holder[key] = draw(st.sampled_from(words))
        case 3 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * draw(st.sampled_from((2, -1, 0.5, 1000))) + draw(st.sampled_from((0, 1, -1)))
        case 4:
            other = draw(st.sampled_from(holders))
            entry = next(iter(other.values() if isinstance(other, dict) else other))
            holder[key] = copy.deepcopy(entry)
        case 5 if words and isinstance(holder, dict):
            holder[draw(st.sampled_from(words))] = junk(draw)
        case _:
            holder[key] = junk(draw)
    return value


def _holders(value: Any) -> list[Any]:
    found, todo = [], [value]
    while todo:
        current = todo.pop()
        if isinstance(current, dict | list):
            found.append(current)
            todo.extend(current.values() if isinstance(current, dict) else current)
    return found


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes cut short, repeated, overwritten or with a few bits turned."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                del changed[at:]
            case 1:
                changed[at:at] = draw(st.binary(max_size=8))
            case 2:
                del changed[at : at + draw(st.integers(1, 16))]
            case 3:
                changed[at : at + 8] = draw(st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7)))
            case 4:
                changed += changed[at : at + 64]
            case _:
                if changed:
                    changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def damage_message(draw: Draw, message: Message, words: tuple[str, ...] = ()) -> None:
    """Change one to three fields of a protobuf message, at any depth, in place."""
    for _ in range(draw(st.integers(1, 3))):
        parts = [part for part in _messages(message) if part.ListFields()]
        if not parts:
            return
        part = draw(st.sampled_from(parts))
        field, value = draw(st.sampled_from(part.ListFields()))
        if field.is_repeated:
            _damage_list(draw, part, field, value, words)
        elif field.type == field.TYPE_MESSAGE or draw(st.integers(0, 3)) == 0:
            part.ClearField(field.name)
        else:
            _assign(part, field.name, _scalar(draw, field, words))


def _damage_list(draw: Draw, part: Message, field: Any, value: Any, words: tuple[str, ...]) -> None:
    at = draw(st.integers(0, len(value) - 1))
    match draw(st.integers(0, 3)):
        case 0:
            del value[at]
        case 1:
            value.append(copy.deepcopy(value[at]))
        case 2 if len(value) > 1:
            other, items = draw(st.integers(0, len(value) - 1)), [copy.deepcopy(v) for v in value]
            items[at], items[other] = items[other], items[at]
            del value[:]
            value.extend(items)
        case _ if field.type == field.TYPE_MESSAGE:
            del value[at:]
        case _:
            items = list(value)
            items[at] = _scalar(draw, field, words)
            keep = list(value)
            del value[:]
            try:
                value.extend(items)
            except (TypeError, ValueError):
                value.extend(keep)


def _scalar(draw: Draw, field: Any, words: tuple[str, ...]) -> Any:
    if field.type == field.TYPE_STRING:
        text = draw(st.sampled_from((*words, *_TEXTS)))
        return text.encode("utf-8", "replace").decode()
    if field.type == field.TYPE_BYTES:
        return draw(st.binary(max_size=32))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw(st.sampled_from(_REALS))
    return draw(st.sampled_from((0, 1, 2, 3, 7, 11, 16, 24, 99, -1, -2, 1 << 15, (1 << 31) - 1, (1 << 62))))


def _assign(part: Message, name: str, value: Any) -> None:
    try:
        setattr(part, name, value)
    except (TypeError, ValueError):  # a number that the field cannot hold, an enumeration without it
        part.ClearField(name)


def _messages(message: Message) -> list[Message]:
    found, todo = [], [message]
    while todo:
        current = todo.pop()
        found.append(current)
        for field, value in current.ListFields():
            if field.type == field.TYPE_MESSAGE:
                todo.extend(value if field.is_repeated else [value])
    return found
