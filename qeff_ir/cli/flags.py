"""Compiler flags on the command line: every ``--option`` that `qeff` itself does not have."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

_META = "qeff.flags"
_INTEGER = re.compile(r"[+-]?\d+")


class FlagCommand(TyperCommand):
    """A command that keeps unknown options as compiler flags: ``--key value``, ``--key=value``, or bare ``--key``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the flags out before typer reads the rest.

        Raises:
            BadParameter: An unknown option is written almost like one of the command's own.
        """
        try:
            flags, rest = split_flags(args, self._options())
        except typer.BadParameter as error:
            error.ctx = ctx
            raise
        ctx.meta[_META] = flags
        return super().parse_args(ctx, rest)

    def _options(self) -> dict[str, bool]:
        """The command's own long options, and whether each takes a value."""
        own = {name: not getattr(p, "is_flag", False) for p in self.params for name in (*p.opts, *p.secondary_opts)}
        return {name: takes for name, takes in own.items() if name.startswith("-")} | {"--help": False, "-h": False}


def flags_of(context: typer.Context) -> Mapping[str, Any]:
    """The compiler flags of the command that runs, by their Python names."""
    return context.meta.get(_META, {})


def split_flags(words: list[str], own: Mapping[str, bool]) -> tuple[dict[str, Any], list[str]]:
    """Separate compiler flags from a command's own words.

    Args:
        words: The command line after the command.
        own: The command's options, and whether each takes a value.

    Returns:
        The flags (dashes become underscores, whole numbers are read, a bare flag is `True`), and the other words.

    Raises:
        BadParameter: An unknown option is written almost like one of `own`: a mistake would go unnoticed as a flag.
    """
    flags: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            return flags, [*rest, word, *queue]
        name, equals, value = word.partition("=")
        if name in own or not name.startswith("--"):
            rest.append(word)
            if own.get(name) and not equals and queue:
                rest.append(queue.pop(0))
            continue
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
        if near:
            raise typer.BadParameter(f"there is no option {name}; did you mean {near[0]}?")
        if not equals and queue and _is_value(queue[0]):
            value = queue.pop(0)
            equals = "="
        flags[name[2:].replace("-", "_")] = _read(value) if equals else True
    return flags, rest


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _INTEGER.fullmatch(word) is not None


def _read(value: str) -> int | str:
    return int(value) if _INTEGER.fullmatch(value) else value
