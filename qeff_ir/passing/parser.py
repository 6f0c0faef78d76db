"""Reads pipelines; the grammar is in `qeff_ir.passing.pipeline`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Sequence
from typing import Any

from qeff_ir.errors import PipelineError
from qeff_ir.passing.base import Pass, broken_plugins, find_pass, registered_passes
from qeff_ir.passing.options import MISFIT, WORD, Option, nearest, options, read
from qeff_ir.passing.places import end_of_phase, place

_NAME = re.compile(r"[A-Za-z][\w-]*")
_ID = re.compile(r"[A-Za-z][\w-]*(#[0-9]+)?")
_NUMBER = re.compile(r"[0-9]+")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class Parser:
    """Recursive descent over the grammar in the module's docstring."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def passes(self, start: Sequence[Pass] = ()) -> list[Pass]:
        """The passes of the text, stock pipelines expanded and edits done; `start` stands before them."""
        made = [*start]
        self._space()
        while self.at < len(self.text):
            if self._take("@"):
                made += self._stock()
            elif self._take("+"):
                self._insert(made)
            elif self._take("-"):
                del made[self._known(made)]
            else:
                made.append(self._pass(made))
            self._space()
            if self.at < len(self.text) and not self._take(","):
                raise self._error("a ',' is missing between two passes", self.at)
            if self.text[self.at - 1] == "," and not self.text[self.at :].strip():
                raise self._error("a pass is missing after the ','", self.at)
            self._space()
        return made

    def _insert(self, made: list[Pass]) -> None:
        """Put a pass at the end of its phase, or before (``<``) or behind (``>``) another."""
        item = self._pass(made)
        if self._take("<"):
            at = self._known(made)
        elif self._take(">"):
            at = self._known(made) + 1
        else:
            at = end_of_phase(made, item)
        made.insert(at, item)

    def _known(self, made: list[Pass]) -> int:
        """The place of the pass whose instance id is next."""
        start = self.at
        id = self._match(_ID, "the name of a pass")
        try:
            return place(made, id.removesuffix("#1"))
        except PipelineError as error:
            raise self._error(str(error), start) from error

    def _stock(self) -> list[Pass]:
        targets = importlib.import_module("backends")  # by name, as plug-ins are: they lie above this package
        start = self.at - 1
        name = self._match(_NAME, "the name of a stock pipeline")
        if name not in targets.backend_names():
            raise self._error(f"there is no stock pipeline '@{name}'; {nearest(name, targets.backend_names())}", start)
        return Parser(targets.find_backend(name).pipeline).passes()

    def _pass(self, before: Sequence[Pass]) -> Pass:
        start = self.at
        name = self._match(_NAME, "the name of a pass")
        cls = find_pass(name)
        if cls is None:
            broken = broken_plugins().get(name)
            why = f"its plugin cannot be imported: {broken}" if broken else nearest(name, registered_passes())
            raise self._error(f"there is no pass '{name}'; {why}", start)
        if self._take("#"):
            self._check_use(name, sum(item.name == name for item in before) + 1, start)
        given = self._options(cls) if self._take("{") else {}
        missing = [o.name for o in options(cls).values() if o.default is dataclasses.MISSING and o.field not in given]
        if missing:
            raise self._error(f"{name} needs the option '{missing[0]}'", start)
        return cls(**given)

    def _check_use(self, name: str, use: int, start: int) -> None:
        """Check the suffix of an instance id, which may be written and says which use of a pass this is."""
        written = self._match(_NUMBER, "the number of a use")
        if int(written) != use:
            right = f"{name}#{use}" if use > 1 else name
            raise self._error(f"'{name}#{written}' is use {use} of {name}: write '{right}'", start)

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
        word = self._match(_STRING if quoted else WORD, "a value")
        value: Any = MISFIT
        if quoted:
            try:
                value = json.loads(word)
            except ValueError as error:
                raise self._error(f"{word} is not a JSON string ({error})", start) from error
            value = value if str in option.kinds or value in option.kinds else MISFIT
        else:
            # Any word is a text: that kind comes last.
            kinds = sorted(option.kinds, key=lambda kind: kind is str)
            value = next((v for k in kinds if (v := read(word, k)) is not MISFIT), MISFIT)
        if value is MISFIT:
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
