"""Pipelines are text and values: ``"fuse-norms,attention{impl=grouped},kv-retention{layout=scatter ring=off}"``.

Grammar::

    pipeline = [ pass { "," pass } ]
    pass     = name [ "{" [ option { " " option } ] "}" ]
    option   = key "=" value          value = word | JSON string

Option keys are the fields of the pass, with dashes or underscores. Printing writes only what differs from the defaults,
and ``Pipeline.parse(str(pipeline)) == pipeline``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qeff_ir.errors import PipelineError
from qeff_ir.passing.base import Pass, registered_passes

_NAME = re.compile(r"[A-Za-z][\w-]*")
_WORD = re.compile(r'[^\s{},="]+')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes with their options; a value that can be compared, printed and edited.

    Attributes:
        passes: The passes in order.
    """

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read a pipeline.

        Raises:
            PipelineError: A pass, option or value is unknown or malformed; the message points at the place in the text
                and gives the nearest name or the allowed values.
        """
        return cls(tuple(_Parser(text).passes()))

    def __str__(self) -> str:
        return ",".join(_print_pass(p) for p in self.passes)

    def __iter__(self) -> Iterator[tuple[str, Pass]]:
        """Each pass with its instance id: the name, and ``#n`` from the second use on."""
        seen: dict[str, int] = {}
        for item in self.passes:
            seen[item.name] = seen.get(item.name, 0) + 1
            yield item.name if seen[item.name] == 1 else f"{item.name}#{seen[item.name]}", item


@dataclass(frozen=True)
class Option:
    """One option of a pass, as declared by a dataclass field.

    Attributes:
        name: Name in pipelines, with dashes.
        field: Name of the field.
        kinds: What a value may be: types and literal values, `None` included.
        default: Value when the pipeline says nothing; `dataclasses.MISSING` when it must be given.
        help: One line.
    """

    name: str
    field: str
    kinds: tuple[Any, ...]
    default: Any
    help: str

    @property
    def values(self) -> str:
        """What a value may be, for people: ``scatter|tensor-scatter`` or ``int``."""
        return "|".join(_spelled(k) if not isinstance(k, type) else k.__name__ for k in self.kinds)


@functools.cache
def options(cls: type[Pass]) -> dict[str, Option]:
    """The options of a pass by field name."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Option] = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Option(
            field.name.replace("_", "-"), field.name, _kinds(hints[field.name]), default, field.metadata.get("help", "")
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


def _spelled(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str) and (not _WORD.fullmatch(value) or _reads_as_other(value)):
        return json.dumps(value)
    return str(value)


def _reads_as_other(text: str) -> bool:
    """Whether a text, unquoted, could be read as a value that is no text."""
    return text in ("none", "true", "false") or _read(text, float) is not _MISFIT


def _print_pass(item: Pass) -> str:
    given = [
        f"{o.name}={_spelled(value)}"
        for o in options(type(item)).values()
        if (value := getattr(item, o.field)) != o.default or type(value) is not type(o.default)
    ]
    return item.name + (f"{{{' '.join(given)}}}" if given else "")


class _Parser:
    """Recursive descent over the grammar in the module's docstring."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def passes(self) -> Iterator[Pass]:
        known = registered_passes()
        self._space()
        while self.at < len(self.text):
            start = self.at
            name = self._match(_NAME, "the name of a pass")
            cls = known.get(name)
            if cls is None:
                raise self._error(f"there is no pass '{name}'; {nearest(name, known)}", start)
            given = self._options(cls) if self._take("{") else {}
            missing = [
                o.name for o in options(cls).values() if o.default is dataclasses.MISSING and o.field not in given
            ]
            if missing:
                raise self._error(f"{name} needs the option '{missing[0]}'", start)
            yield cls(**given)
            self._space()
            if self.at < len(self.text) and not self._take(","):
                raise self._error("a ',' is missing between two passes", self.at)
            if self.text[self.at - 1] == "," and not self.text[self.at :].strip():
                raise self._error("a pass is missing after the ','", self.at)
            self._space()

    def _options(self, cls: type[Pass]) -> dict[str, Any]:
        declared = options(cls)
        given: dict[str, Any] = {}
        self._space()
        while not self._take("}"):
            start = self.at
            key = self._match(_NAME, "an option or '}'")
            option = declared.get(key.replace("-", "_"))
            if option is None:
                names = [o.name for o in declared.values()]
                raise self._error(f"{cls.name} has no option '{key}'; {nearest(key, names)}", start)
            if option.field in given:
                raise self._error(f"the option '{option.name}' is given twice", start)
            if not self._take("="):
                raise self._error(f"'=' and a value are missing after '{key}'", self.at)
            given[option.field] = self._value(option)
            self._space()
        return given

    def _value(self, option: Option) -> Any:
        start = self.at
        quoted = self.text[self.at : self.at + 1] == '"'
        word = self._match(_STRING if quoted else _WORD, "a value")
        value: Any = _MISFIT
        if quoted:
            try:
                value = json.loads(word)
            except ValueError as error:
                raise self._error(f"{word} is not a JSON string ({error})", start) from error
            value = value if str in option.kinds or value in option.kinds else _MISFIT
        else:
            # Any word is a text: that kind comes last.
            kinds = sorted(option.kinds, key=lambda kind: kind is str)
            value = next((v for k in kinds if (v := _read(word, k)) is not _MISFIT), _MISFIT)
        if value is _MISFIT:
            raise self._error(f"'{word}' is no value for '{option.name}', which takes {option.values}", start)
        return value

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _take(self, char: str) -> bool:
        if self.text.startswith(char, self.at):
            self.at += 1
            return True
        return False

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self._error(f"expected {what}", self.at)
        self.at = match.end()
        return match.group()

    def _error(self, message: str, place: int) -> PipelineError:
        line = re.sub(r"\s", " ", self.text)  # a pipeline over several lines is shown in one, for the caret's sake
        return PipelineError(f"{message}\n  {line}\n  {' ' * place}^")


_MISFIT = object()


def _read(word: str, kind: Any) -> Any:
    """`word` as a value of one kind, or `_MISFIT`."""
    if kind is bool:
        return {"true": True, "false": False}.get(word, _MISFIT)
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            return _MISFIT
    if kind is str:
        return word
    return kind if word == _spelled(kind) else _MISFIT
