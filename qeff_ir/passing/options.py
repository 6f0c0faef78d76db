"""The options of a pass or a target: dataclass fields, how values are written, and what is near a misspelled name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qeff_ir.errors import PassError
from qeff_ir.passing.base import registered_passes

WORD = re.compile(r'[^\s{},="]+')
"""A value that needs no quotes."""
_NUMBER = re.compile("[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Option:
    """One option of a pass or a target, as declared by a dataclass field.

    Attributes:
        name: Name in pipelines, with dashes.
        field: Name of the field.
        kinds: What a value may be: types and literal values, `None` included; the field's metadata may name them
            (``"choices": REGISTRY``), for values that plug-ins add to.
        default: Value when the pipeline says nothing; `dataclasses.MISSING` when it must be given.
        help: One line.
        path: Whether it names a file or folder that is read; the field's metadata say so (``"path": True``).
        least: Of a target's whole number, the least that is taken; the field's metadata say so (``"least": 0``).
        told: Of a pass, the option of `compile` whose value it has where the pipeline gives none; the field's metadata
            say so (``"compile": "num_devices"``).
    """

    name: str
    field: str
    kinds: tuple[Any, ...]
    default: Any
    help: str
    path: bool = False
    least: int = 1
    told: str | None = None

    @property
    def values(self) -> str:
        """What a value may be, for people: ``scatter|tensor-scatter`` or ``int``."""
        return "|".join(as_text(k) if not isinstance(k, type) else k.__name__ for k in self.kinds)

    def takes(self, value: Any) -> bool:
        """Whether a Python value is one of the option's."""
        return any(
            type(value) is k if isinstance(k, type) else value == k and type(value) is type(k) for k in self.kinds
        )


@functools.cache
def options(cls: type[Any]) -> dict[str, Option]:
    """The options of a dataclass, a pass or what a target takes, by field name."""
    hints = typing.get_type_hints(cls)
    if any("choices" in field.metadata for field in dataclasses.fields(cls)):
        registered_passes()  # which may add to them
    found: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Option(
            field.name.replace("_", "-"),
            field.name,
            tuple(field.metadata["choices"]) if "choices" in field.metadata else _kinds(hints[field.name]),
            default,
            field.metadata.get("help", ""),
            bool(field.metadata.get("path")),
            field.metadata.get("least", 1),
            field.metadata.get("compile"),
        )
    return found


def nearest(word: str, names: Iterable[str]) -> str:
    """A clause that suggests the nearest of some names, or lists them when none is near."""
    names = list(names)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"there are {', '.join(names)}" if names else "there are none"


def _kinds(hint: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(k for part in typing.get_args(hint) for k in _kinds(part))
    if hint is type(None):
        return (None,)
    return (hint,)


def as_text(value: Any) -> str:
    """A value as pipelines write it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str) and (not WORD.fullmatch(value) or _reads_as_other(value)):
        return json.dumps(value)
    return str(value)


def _reads_as_other(text: str) -> bool:
    """Whether a text, unquoted, could be read as a value of another kind."""
    return text in ("none", "true", "false") or read(text, float) is not MISFIT


MISFIT = object()
"""The result of `read` for a word that is not a value of the kind."""


def read(word: str, kind: Any) -> Any:
    """`word` as a value of one kind, or `MISFIT`."""
    if kind is bool:
        return {"true": True, "false": False}.get(word, MISFIT)
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            return MISFIT
    if kind is str:
        return word
    return kind if word == as_text(kind) else MISFIT


def whole_numbers(value: int | str, name: str) -> list[int]:
    """The numbers of an option that takes one or, as a text with commas, several; sorted, each once.

    Raises:
        PassError: There are none, or one is no whole number of at least 1.
    """
    words = [word.strip() for word in str(value).split(",")]
    if not all(_NUMBER.fullmatch(word) for word in words):
        raise PassError(f"{name} is {value!r}: give whole numbers of at least 1, with commas between them")
    return sorted({int(word) for word in words})
